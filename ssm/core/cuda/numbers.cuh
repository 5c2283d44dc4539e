// What kernels share: bf16 and f32 as numbers, 16-byte loads, activation functions, sums over a warp or
// block. Included by .cu files only.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ssm/core/dtype.h"

namespace ssm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x by the exponentials' unit (ex2.approx); subnormal results are 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T>
__device__ inline T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        T y;
        y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
        return y;
    }
}

// N consecutive elements that one instruction (or two, for 32 bytes) moves; the address must be aligned so.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
    T at[N];
};
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}
// As one number: a struct is stored member by member, and the compiler does not always join the stores again.
template <int N, class T>
__device__ inline void store_pack(T* p, const Pack<T, N>& v) {
    constexpr size_t kBytes = sizeof(Pack<T, N>);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (size_t i = 0; i < kBytes / 16; ++i)
            reinterpret_cast<unsigned __int128*>(p)[i] = reinterpret_cast<const unsigned __int128*>(&v)[i];
    } else if constexpr (kBytes == 8) {
        *reinterpret_cast<uint64_t*>(p) = reinterpret_cast<const uint64_t&>(v);
    } else {
        *reinterpret_cast<Pack<T, N>*>(p) = v;
    }
}
// Whether rows of `stride` elements that begin at p can be read as packs of N.
template <class T>
inline bool packable(const T* p, int64_t stride, int64_t n) {
    return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * static_cast<size_t>(n)) == 0 && stride % n == 0;
}

// To about 4 ulp for moderate x: two instructions of the special function unit, without the range checks and
// refinement that a division and exp cost (they bound memory-bound kernels). 0 below about -88.
__device__ inline float sigmoid(float x) {
    float e, y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
    return y;
}
__device__ inline float silu(float x) { return x * sigmoid(x); }
// d silu(x) / dx, given sigmoid(x).
__device__ inline float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }
// log(1 + exp(x)); x where that is x to f32's precision.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
    return x;
}
// Sum over the block, in every thread, in a fixed order. `scratch`: one float per warp. All threads must call
// it.
__device__ inline float block_sum(float x, float* scratch) {
    const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp, lane = threadIdx.x % kWarp;
    x = warp_sum(x);
    __syncthreads();  // whoever still reads the last sum
    if (lane == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
    return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace ssm::cuda
