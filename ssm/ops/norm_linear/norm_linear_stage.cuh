// Before the product, in the kernels of norm_linear that multiply by FMAs: a block of kThreads puts v into
// shared memory, in the weight's type. Included by .cu files only.
#pragma once

#include "ssm/ops/norm_linear/norm_linear_cuda.cuh"

namespace ssm::cuda::norm_linear_kernels {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <class X>
__device__ inline float gate_of(const Params& p, int64_t t, int64_t j) {
    return silu(to_float(static_cast<const X*>(p.z)[t * p.z_stride + j]));
}

// Norm weights of the columns of a thread in C rounds from `first` on.
template <int P, int C>
__device__ inline void fetch_norm_weights(const Params& p, int64_t first, Pack<float, P> (&w)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) w[c] = norm_weights<P>(p, first + (c * kThreads + threadIdx.x) * P);
}

// One group, or no norm: v without the division; squares[warp][t] are the warps' sums of squares. C rounds of
// the block are under way together; `w` are the weights of the first ones. kPlain: neither norm nor gate.
template <class X, class W, bool kPlain, int T, int P, int C>
__device__ inline void stage(const Params& p, Pack<float, P> (&w)[C], W* v, float (*squares)[T]) {
    float sums[T] = {};
    for (int64_t first = 0; first < p.i; first += C * kThreads * P) {
        if (!kPlain && first > 0) fetch_norm_weights<P>(p, first, w);
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Pack<X, P> x[C] = {}, z[C] = {};
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int64_t j = first + (c * kThreads + threadIdx.x) * P;
                if (t >= p.t || j >= p.i) continue;
                x[c] = load_pack<P>(static_cast<const X*>(p.x) + t * p.x_stride + j);
                if (!kPlain && p.gate != Gate::none)
                    z[c] = load_pack<P>(static_cast<const X*>(p.z) + t * p.z_stride + j);
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int64_t j = first + (c * kThreads + threadIdx.x) * P;
                if (j >= p.i) break;
                Pack<W, P> out;
#pragma unroll
                for (int k = 0; k < P; ++k) {
                    if constexpr (kPlain) {
                        out.at[k] = from_float<W>(to_float(x[c].at[k]));
                        continue;
                    }
                    const float g = p.gate != Gate::none ? silu(to_float(z[c].at[k])) : 1.0f;
                    float one = to_float(x[c].at[k]);
                    if (p.gate == Gate::before) one *= g;
                    sums[t] = fmaf(one, one, sums[t]);
                    if (p.gate == Gate::after) one *= g;
                    out.at[k] = from_float<W>(one * w[c].at[k]);
                }
                store_pack(v + t * p.i + j, out);
            }
        }
    }
    if constexpr (!kPlain) {
        if (p.groups == 0) return;
#pragma unroll
        for (int t = 0; t < T; ++t) {
            sums[t] = warp_sum(sums[t]);
            if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp][t] = sums[t];
        }
    }
}

// Several groups: a warp takes one of one token; v is divided here.
template <class X, class W, int T>
__device__ inline void stage_groups(const Params& p, W* v) {
    const int64_t width = p.i / p.groups;
    for (int64_t unit = threadIdx.x / kWarp; unit < T * p.groups; unit += kWarps) {
        const int64_t t = unit / p.groups, begin = unit % p.groups * width;
        const bool real = t < p.t;
        const X* x = static_cast<const X*>(p.x) + (real ? t : 0) * p.x_stride;
        float sum = 0.0f;
        for (int64_t j = begin + threadIdx.x % kWarp; real && j < begin + width; j += kWarp) {
            const float one = to_float(x[j]) * (p.gate == Gate::before ? gate_of<X>(p, t, j) : 1.0f);
            sum = fmaf(one, one, sum);
        }
        const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(width) + p.eps);
        for (int64_t j = begin + threadIdx.x % kWarp; j < begin + width; j += kWarp) {
            float one = 0.0f;
            if (real)
                one = to_float(x[j]) * (p.gate != Gate::none ? gate_of<X>(p, t, j) : 1.0f) * rstd *
                      norm_weights<1>(p, j).at[0];
            v[t * p.i + j] = from_float<W>(one);
        }
    }
}

template <int T>
__device__ inline float division(const Params& p, const float (*squares)[T], int t) {
    if (p.groups != 1) return 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w][t];
    return rsqrtf(sum / static_cast<float>(p.i) + p.eps);
}

}  // namespace ssm::cuda::norm_linear_kernels
