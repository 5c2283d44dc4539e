// What the kernels of norm_linear share: their parameters, and what a thread that holds the sum of a row
// of W and a row of x does with it. Included by .cu files only.
#pragma once

#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/words.cuh"
#include "ssm/ops/norm_linear/norm_linear_impl.h"

namespace ssm::cuda::norm_linear_kernels {

constexpr std::string_view kOp = "norm_linear";
constexpr int kTaps = 4;  // of the convolution that is fetched ahead

using Gate = RmsNormOptions::Gate;

struct ConvParams {
    int64_t first, d;  // columns of y; d = 0: none
    int k;
    const float* weight;  // [d k]
    int64_t weight_stride;
    const float* bias;  // [d] or absent
    void* state;        // [any k-1 d] of y's type
    int64_t state_stride;
    const int32_t* slots;  // [t] or absent
    bool silu;
};

struct Params {
    int64_t i, o, tasks;
    int64_t v_bytes;  // of v in shared memory, in front of the rings
    int t;
    const void *x, *z;  // [t i]
    int64_t x_stride, z_stride;
    const float* norm_weight;  // [i] or absent
    int64_t groups;            // 0: no norm
    float eps;
    bool unit_offset;
    Gate gate;
    const void* weight;  // [o i]
    int64_t weight_stride;
    const float* bias;  // [o] or absent
    void* y;            // [t o]
    int64_t y_stride;
    bool y_is_bf16, add, ask_first;
    ConvParams conv;
};

// By tensor cores, for small bf16 weights and 5 to 512 rows of bf16 x, neither norm nor gate; false: it does
// not suit.
bool small(const Exec& ex, const Params& p, bool x_is_bf16);
// By one round of small blocks, for small bf16 weights and up to 4 rows of x; false: it does not suit.
bool split(const Exec& ex, const Params& p, bool x_is_bf16);
// Through rings in shared memory, for bf16 weights that are large_on_gpu and up to 2 rows of x; false: it
// does not suit.
bool streamed(const Exec& ex, const Params& p, bool x_is_bf16);

template <int P>
__device__ inline Pack<float, P> norm_weights(const Params& p, int64_t j) {
    Pack<float, P> w;
#pragma unroll
    for (int k = 0; k < P; ++k) w.at[k] = 1.0f;
    if (p.norm_weight == nullptr || j >= p.i) return w;
    w = load_pack<P>(p.norm_weight + j);
#pragma unroll
    for (int k = 0; k < P; ++k) w.at[k] += p.unit_offset ? 1.0f : 0.0f;
    return w;
}

// ---- After the product: what a lane that holds the sum of (row, token) does with it ----

// Fetched ahead: constants before the inputs are there, the rest after.
struct Ahead {
    float bias = 0.0f, conv_bias = 0.0f, old = 0.0f, taps[kTaps] = {}, inputs[kTaps - 1] = {};
};

__device__ inline bool in_conv(const Params& p, int64_t row) {
    return row >= p.conv.first && row < p.conv.first + p.conv.d;
}
__device__ inline float load_y(const Params& p, const void* data, int64_t at) {
    return p.y_is_bf16 ? to_float(static_cast<const bf16*>(data)[at]) : static_cast<const float*>(data)[at];
}
__device__ inline void store_y(const Params& p, void* data, int64_t at, float y) {
    if (p.y_is_bf16) {
        static_cast<bf16*>(data)[at] = from_float<bf16>(y);
    } else {
        static_cast<float*>(data)[at] = y;
    }
}

__device__ inline void fetch_constants(const Params& p, int64_t row, Ahead& a) {
    if (row >= p.o) return;
    if (p.bias != nullptr) a.bias = p.bias[row];
    if (!in_conv(p, row)) return;
    const int64_t c = row - p.conv.first;
    if (p.conv.bias != nullptr) a.conv_bias = p.conv.bias[c];
    if (p.conv.k != kTaps) return;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) a.taps[j] = p.conv.weight[c * p.conv.weight_stride + j];
}

__device__ inline int64_t state_at(const Params& p, int64_t row, int t) {
    const int64_t slot = p.conv.slots != nullptr ? p.conv.slots[t] : t;
    return slot * p.conv.state_stride + row - p.conv.first;
}

__device__ inline void fetch_variables(const Params& p, int64_t row, int t, Ahead& a) {
    if (row >= p.o || t >= p.t) return;
    if (p.add) a.old = load_y(p, p.y, t * p.y_stride + row);
    if (p.conv.k != kTaps || !in_conv(p, row)) return;
    const int64_t at = state_at(p, row, t);
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) a.inputs[j] = load_y(p, p.conv.state, at + j * p.conv.d);
}

__device__ inline float convolve(const Params& p, int64_t row, int t, float x, const Ahead& a) {
    if (p.y_is_bf16) x = to_float(from_float<bf16>(x));
    const int64_t at = state_at(p, row, t), d = p.conv.d;
    float sum = a.conv_bias;
    if (p.conv.k == kTaps) {
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) {
            sum = fmaf(a.taps[j], a.inputs[j], sum);
            store_y(p, p.conv.state, at + j * d, j + 1 < kTaps - 1 ? a.inputs[(j + 1) % (kTaps - 1)] : x);
        }
        sum = fmaf(a.taps[kTaps - 1], x, sum);
    } else {
        const float* taps = p.conv.weight + (row - p.conv.first) * p.conv.weight_stride;
        for (int j = 0; j < p.conv.k; ++j) {
            const float input = j < p.conv.k - 1 ? load_y(p, p.conv.state, at + j * d) : x;
            if (j > 0) store_y(p, p.conv.state, at + (j - 1) * d, input);
            sum = fmaf(taps[j], input, sum);
        }
    }
    return p.conv.silu ? silu(sum) : sum;
}

__device__ inline void finish(const Params& p, int64_t row, int t, float sum, const Ahead& a) {
    if (row >= p.o || t >= p.t) return;
    float y = sum + a.bias;
    if (in_conv(p, row)) y = convolve(p, row, t, y, a);
    store_y(p, p.y, t * p.y_stride + row, y + a.old);
}

}  // namespace ssm::cuda::norm_linear_kernels
