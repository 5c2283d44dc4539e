// Tiles of the CUDA kernels of ssd: 64 tokens of one head in shared memory, and their time steps. Private.
#pragma once

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/sequences.cuh"
#include "ssm/ops/ssd/ssd_fragments.cuh"
#include "ssm/ops/ssd/ssd_impl.h"

namespace ssm::cuda {

constexpr int kQ = 64;   // tokens of a tile
constexpr int kP = 64;   // elements of a head in a tile; a wider head is several tiles
constexpr int kPad = 8;  // behind each row in shared memory: no two rows of a fragment in one bank
constexpr int kMaxN = 128;

// ---- tiles
// kRows x kColumns from rows `stride` apart, rounded to E; zero from `rows` and `columns` on. `packed`: rows
// are aligned to 16 bytes and `columns` is a multiple of what 16 bytes hold.
template <int kRows, int kColumns, int kThreads, class E, class T>
__device__ inline void load_tile(E* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    constexpr int kLd = kColumns + kPad, kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
    if (packed) {
#pragma unroll 4
        for (int i = threadIdx.x; i < kRows * kPacks; i += kThreads) {
            const int row = i / kPacks, column = i % kPacks * kPack;
            Pack<T, kPack> v = {};
            if (row < rows && column < columns) v = load_pack<kPack>(from + row * stride + column);
            if constexpr (sizeof(T) == sizeof(E)) {
                store_pack(to + row * kLd + column, v);
            } else {
                Pack<E, kPack> rounded;
#pragma unroll
                for (int k = 0; k < kPack; ++k) rounded.at[k] = from_float<E>(to_float(v.at[k]));
                store_pack(to + row * kLd + column, rounded);
            }
        }
    } else {
        for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            const bool inside = row < rows && column < columns;
            to[row * kLd + column] = from_float<E>(inside ? to_float(from[row * stride + column]) : 0.0f);
        }
    }
}

// The same without waiting: by asynchronous copies where rows are packed; wait_copies() and a barrier before
// use.
template <int kRows, int kColumns, int kThreads, class T>
__device__ inline void copy_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    if (!packed) return load_tile<kRows, kColumns, kThreads>(to, from, stride, rows, columns, false);
    constexpr int kLd = kColumns + kPad, kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
    static_assert(kRows * kPacks % kThreads == 0);
#pragma unroll
    for (int k = 0; k < kRows * kPacks / kThreads; ++k) {
        const int i = static_cast<int>(threadIdx.x) + k * kThreads, row = i / kPacks,
                  column = i % kPacks * kPack;
        const bool inside = row < rows && column < columns;
        const T* source = inside ? from + row * stride + column : from;
        const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to + row * kLd + column));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                     "r"(inside ? 16 : 0)
                     : "memory");
    }
}
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Time steps of a tile's tokens; those from `length` on have dt 0 and the last decay sum.
struct Decays {
    float dt[kQ], s[kQ], l[kQ];  // s: sums of dt up to and with this token; l = s A
};

template <class T>
__device__ inline float raw_dt(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return to_float(in.dt.data[t * in.dt.stride + h]) +
           (in.dt_bias.data != nullptr ? in.dt_bias.data[h * in.dt_bias.stride] : 0.0f);
}
__device__ inline float exact_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
template <class T>
__device__ inline float step_of_raw(const SsdInputs<T>& in, float raw) {
    return in.dt_softplus ? fminf(fmaxf(exact_softplus(raw), in.dt_min), in.dt_max) : raw;
}
template <class T>
__device__ inline float step_size(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return step_of_raw(in, raw_dt(in, t, h));
}

// A lane's two raw time steps of a tile; by one warp, as are those below.
template <class T>
__device__ inline float2 raw_pair(const SsdInputs<T>& in, int64_t begin, int length, int64_t h) {
    const int i = 2 * (threadIdx.x % kWarp);
    return {i < length ? raw_dt(in, begin + i, h) : 0.0f,
            i + 1 < length ? raw_dt(in, begin + i + 1, h) : 0.0f};
}
template <class T>
__device__ inline void make_decays(Decays& d, const SsdInputs<T>& in, float2 raw, int length, int64_t h) {
    const int lane = threadIdx.x % kWarp, i = 2 * lane;
    const float dt0 = i < length ? step_of_raw(in, raw.x) : 0.0f;
    const float dt1 = i + 1 < length ? step_of_raw(in, raw.y) : 0.0f;
    const double A = in.A.data[h * in.A.stride];
    double sum = static_cast<double>(dt0) + dt1;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += other;
    }
    d.dt[i] = dt0;
    d.dt[i + 1] = dt1;
    d.s[i] = static_cast<float>(sum - dt1);
    d.s[i + 1] = static_cast<float>(sum);
    d.l[i] = static_cast<float>((sum - dt1) * A);
    d.l[i + 1] = static_cast<float>(sum * A);
}

template <class T>
__device__ inline void make_decays(Decays& d, const SsdInputs<T>& in, int64_t begin, int length, int64_t h) {
    make_decays(d, in, raw_pair(in, begin, length, h), length, h);
}

// D of a tile's elements, 0 where it is absent; by kP threads.
__device__ inline void load_D(float* to, const View<const float, 2>& D, int64_t h, int64_t p0, int columns) {
    const int j = threadIdx.x % kP;
    const bool given = D.data != nullptr && j < columns;
    to[j] = given ? D.data[h * D.stride + (D.shape[1] == 1 ? 0 : p0 + j)] : 0.0f;
}

// ---- host
// Whether rows of [t a b] can be loaded in packs of 16 bytes.
template <class T, size_t R>
bool packed16(const T* data, int64_t stride, const std::array<int64_t, R>& shape) {
    const int64_t n = 16 / static_cast<int64_t>(sizeof(T));
    return packable(data, stride, n) && shape[R - 1] % n == 0;
}

inline std::vector<int64_t> first_chunks(CuSeqlens cu_seqlens, int64_t chunk) {
    std::vector<int64_t> first{0};
    for (size_t s = 1; s < cu_seqlens.size(); ++s)
        first.push_back(first.back() + (cu_seqlens[s] - cu_seqlens[s - 1] + chunk - 1) / chunk);
    return first;
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Dynamic shared memory beyond 48 KB has to be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, std::string_view op) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          op);
}

inline void require_state_width(std::string_view op, int64_t n) {
    if (n > kMaxN) fail(ErrorCode::unsupported, op, "on CUDA n may be at most {} but is {}", kMaxN, n);
}

}  // namespace ssm::cuda
