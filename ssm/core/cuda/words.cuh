// N neighbouring elements as they lie in memory, by 32-bit words: elements of 16 bits that are held for a
// while would each take a register. Included by .cu files only.
#pragma once

#include "ssm/core/cuda/numbers.cuh"

namespace ssm::cuda {

template <class T, int N>
struct Words {
    static constexpr int kBytes = N * static_cast<int>(sizeof(T)), kCount = (kBytes + 3) / 4;
    static_assert(N == 1 || kBytes % 4 == 0);
    uint32_t at[kCount];

    // Element k (a constant, after unrolling).
    __device__ float operator[](int k) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(at[k]);
        } else {
            return __uint_as_float(k % 2 == 0 ? at[k / 2] << 16 : at[k / 2] & 0xffff0000u);
        }
    }
};

// The address must be aligned to the whole, up to 16 bytes.
template <int N, class T>
__device__ inline Words<T, N> load_words(const T* p) {
    using Held = Words<T, N>;
    Held v;
    if constexpr (Held::kBytes == 2) {
        v.at[0] = *reinterpret_cast<const uint16_t*>(p);
    } else if constexpr (Held::kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < Held::kBytes / 16; ++i) {
            const uint4 four = reinterpret_cast<const uint4*>(p)[i];
            v.at[4 * i] = four.x, v.at[4 * i + 1] = four.y, v.at[4 * i + 2] = four.z,
                     v.at[4 * i + 3] = four.w;
        }
    } else if constexpr (Held::kBytes == 8) {
        const uint2 two = *reinterpret_cast<const uint2*>(p);
        v.at[0] = two.x, v.at[1] = two.y;
    } else {
        static_assert(Held::kBytes == 4);
        v.at[0] = *reinterpret_cast<const uint32_t*>(p);
    }
    return v;
}

template <int N, class T>
__device__ inline void store_words(T* p, const Words<T, N>& v) {
    constexpr int kBytes = Words<T, N>::kBytes;
    static_assert(kBytes % 8 == 0);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
            reinterpret_cast<uint4*>(p)[i] = {v.at[4 * i], v.at[4 * i + 1], v.at[4 * i + 2], v.at[4 * i + 3]};
    } else {
        *reinterpret_cast<uint2*>(p) = {v.at[0], v.at[1]};
    }
}

// N numbers, each rounded to T.
template <class T, int N>
__device__ inline Words<T, N> to_words(const float (&x)[N]) {
    Words<T, N> v;
#pragma unroll
    for (int i = 0; i < Words<T, N>::kCount; ++i) {
        if constexpr (sizeof(T) == 4) {
            v.at[i] = __float_as_uint(x[i]);
        } else {
            const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            v.at[i] = reinterpret_cast<const uint32_t&>(two);
        }
    }
    return v;
}

// What is read once, and not written while the kernel runs: past L1. Not moved over other such statements.
template <int N, class T>
__device__ inline Words<T, N> load_words_once(const T* p) {
    if constexpr (Words<T, N>::kBytes == 16) {
        Words<T, N> v;
        asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.at[0]), "=r"(v.at[1]), "=r"(v.at[2]), "=r"(v.at[3])
                     : "l"(p));
        return v;
    } else {
        return load_words<N>(p);
    }
}

}  // namespace ssm::cuda
