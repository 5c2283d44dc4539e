// Sums over lanes of a warp.
#pragma once

#include "ssm/core/cuda/numbers.cuh"

namespace ssm::cuda {

// The sums over groups of G lanes of V values each (V <= G <= 32, powers of two): lane l of a group returns
// that of value l / (G / V). Each exchange halves what a lane holds: V - 1 + log2(G / V) of them instead of
// V log2 G.
template <int V, int G = kWarp>
__device__ inline float sum_values(float (&v)[V]) {
    int offset = G / 2;
#pragma unroll
    for (int n = V; n > 1; n /= 2) {
        const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
        for (int k = 0; k < V / 2; ++k) {
            if (k >= n / 2) break;
            const float send = upper ? v[k] : v[k + n / 2], keep = upper ? v[k + n / 2] : v[k];
            v[k] = keep + __shfl_xor_sync(kAllLanes, send, offset);
        }
        offset /= 2;
    }
    for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], offset);
    return v[0];
}

}  // namespace ssm::cuda
