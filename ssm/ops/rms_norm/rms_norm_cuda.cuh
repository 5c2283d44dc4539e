// What the forward and the backward kernels of rms_norm share. Private to ssm/ops/rms_norm; included by .cu
// files only.
#pragma once

#include <type_traits>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/rms_norm/rms_norm_impl.h"

namespace ssm::cuda::rms_norm_detail {

using Gate = RmsNormOptions::Gate;
inline constexpr std::string_view kOp = "rms_norm";
inline constexpr int kThreads = 256;

// Where the row of a group lies.
struct Place {
    int64_t row, group, first;  // first: the group's first column
};
__device__ inline Place place_of(int64_t i, int64_t groups, int64_t width) {
    if (groups == 1) return {i, 0, 0};
    return {i / groups, i % groups, i % groups * width};
}

// Sum over a team of consecutive threads, in all of them, in a fixed order. All of the block must call it.
template <int kTeam>
__device__ inline float team_sum(float x, float* scratch) {
    x = warp_sum(x);
    if constexpr (kTeam == kWarp) return x;
    constexpr int kWarps = kTeam / kWarp;
    __syncthreads();  // whoever still reads the last sum
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    const float* mine = scratch + threadIdx.x / kTeam * kWarps;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += mine[i];
    return sum;
}

template <int N>
__device__ inline Pack<float, N> load_weight(const View<const float, 1>& weight, bool unit_offset,
                                             int64_t column) {
    Pack<float, N> w;
    if (weight.data != nullptr) w = load_pack<N>(weight.data + column);
#pragma unroll
    for (int k = 0; k < N; ++k)
        w.at[k] = weight.data == nullptr ? 1.0f : w.at[k] + (unit_offset ? 1.0f : 0.0f);
    return w;
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <class T, int R>
inline bool aligned(const View<T, R>& v, int64_t n) {
    return v.data == nullptr || packable(v.data, R == 1 ? 0 : v.stride, n);
}
// The weight is read by packs of 16 bytes, two of them where N is 8.
inline bool aligned_weight(const View<const float, 1>& weight) { return aligned(weight, 4); }

}  // namespace ssm::cuda::rms_norm_detail
