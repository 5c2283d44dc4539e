// CUDA kernels of mamba_step. Few sequences: 16 lanes take a channel of one; each holds a part of the row of
// W_dt and every 16th state. Many: a block takes 64 channels of 8 sequences; step sizes first, through shared
// memory, while the states, 4 a lane, are under way; W_dt and A then serve 8 sequences.
#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/words.cuh"
#include "ssm/ops/mamba_step/mamba_step_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "mamba_step";
constexpr float kLog2E = 1.4426950408889634f;

template <class T, class W>
struct Params {
    View<const T, 2> x, z;     // [t d]
    View<const float, 2> dbc;  // [t r+2n]
    const W* weight;           // [d r]
    int64_t weight_stride;
    const float *bias, *D;   // [d] or absent
    View<const float, 2> A;  // [d n]
    View<float, 3> state;    // [any d n]
    const int32_t* slots;    // [t] or absent
    View<T, 2> y;            // [t d]
    int r;
    bool normed;
    float eps;

    __device__ float* state_of(int64_t s) const {
        return state.data + (slots != nullptr ? slots[s] : s) * state.stride;
    }
};

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int G>
__device__ inline float group_sum(float x) {
#pragma unroll
    for (int offset = G / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

// ---- Few sequences ----

constexpr int kFewThreads = 128, kLanes = 16, kAhead = 2;

// 1 / rms of count numbers, over a group of 16 lanes.
__device__ inline float group_rstd(const float* v, int count, float eps, int lane) {
    float sum = 0.0f;
    for (int j = lane; j < count; j += kLanes) sum = fmaf(v[j], v[j], sum);
    return rsqrtf(group_sum<kLanes>(sum) / static_cast<float>(count) + eps);
}

template <class T, class W, int V>
__global__ void __launch_bounds__(kFewThreads) Few(const __grid_constant__ Params<T, W> p) {
    allow_next();
    const int lane = threadIdx.x % kLanes, n = static_cast<int>(p.A.shape[1]);
    const int64_t d = p.A.shape[0], s = blockIdx.y;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kFewThreads + threadIdx.x) / kLanes;
    const bool mine = channel < d;
    const int64_t c = mine ? channel : d - 1;
    const W* row = p.weight + c * p.weight_stride;
    const float* A = p.A.data + c * p.A.stride;
    Words<W, V> w[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
        if ((u * kLanes + lane) * V < p.r) w[u] = load_words<V>(row + (u * kLanes + lane) * V);
    const float a = lane < n ? A[lane] : 0.0f, bias = p.bias != nullptr ? p.bias[c] : 0.0f,
                skip = p.D != nullptr ? p.D[c] : 0.0f;
    float* h = p.state_of(s) + c * n;
    if (lane == 0) prefetch_l2(h);
    wait_for_inputs();

    const float* delta = p.dbc.data + s * p.dbc.stride;
    const float *B = delta + p.r, *C = B + n;
    const float x = to_float(p.x.data[s * p.x.stride + c]), z = to_float(p.z.data[s * p.z.stride + c]);
    float state = lane < n ? h[lane] : 0.0f;
    float dot = 0.0f;
    for (int j = lane * V, u = 0; j < p.r; j += kLanes * V, ++u) {
        const Words<W, V> now = u == 0 ? w[0] : u == 1 ? w[1] : load_words<V>(row + j);
        const Pack<float, V> in = load_pack<V>(delta + j);
#pragma unroll
        for (int k = 0; k < V; ++k) dot = fmaf(now[k], in.at[k], dot);
    }
    dot = group_sum<kLanes>(dot);
    float B_scale = 1.0f, C_scale = 1.0f;
    if (p.normed) {
        dot *= group_rstd(delta, p.r, p.eps, lane);
        B_scale = group_rstd(B, n, p.eps, lane);
        C_scale = group_rstd(C, n, p.eps, lane);
    }
    const float dt = softplus(dot + bias);
    float sum = 0.0f;
    for (int j = lane; mine && j < n; j += kLanes) {
        if (j >= kLanes) state = h[j];
        state = fmaf(exp2_fast(dt * kLog2E * (j < kLanes ? a : A[j])), state, dt * x * B[j] * B_scale);
        h[j] = state;
        sum = fmaf(C[j] * C_scale, state, sum);
    }
    sum = group_sum<kLanes>(sum);
    if (!mine || lane != 0) return;
    p.y.data[s * p.y.stride + c] = from_float<T>(fmaf(skip, x, sum) * silu(z));
}

// ---- Many sequences: n = 4 L ----

constexpr int kManyThreads = 256, kSequences = 8;

// Step sizes of the block's channels and sequences; a thread has one channel and every (threads / channels)th
// sequence.
template <class T, class W, int kChannels, int V>
__device__ inline void step_sizes(const Params<T, W>& p, int64_t first, int64_t s0, const float* delta,
                                  const float (*rstd)[3], float (*dt)[kChannels]) {
    constexpr int kTeams = kManyThreads / kChannels, kEach = kSequences / kTeams;
    static_assert(kEach >= 1);
    const int channel = static_cast<int>(threadIdx.x) % kChannels,
              team = static_cast<int>(threadIdx.x) / kChannels;
    const int64_t c = min(first + channel, p.A.shape[0] - 1);
    const W* row = p.weight + c * p.weight_stride;
    float dots[kEach] = {};
    for (int j = 0; j < p.r; j += V) {
        const Words<W, V> w = load_words<V>(row + j);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const Pack<float, V> in = load_pack<V>(delta + (i * kTeams + team) * p.r + j);
#pragma unroll
            for (int k = 0; k < V; ++k) dots[i] = fmaf(w[k], in.at[k], dots[i]);
        }
    }
    const float bias = p.bias != nullptr ? p.bias[c] : 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int s = i * kTeams + team;
        dt[s][channel] = s0 + s < p.x.shape[0] ? softplus(dots[i] * rstd[s][0] + bias) : 0.0f;
    }
}

// Shared: delta [8 r], then a warp norms a sequence's delta, B and C.
template <class T, class W>
__device__ inline void load_deltas(const Params<T, W>& p, int64_t s0, float* delta, float (*rstd)[3]) {
    const int n = static_cast<int>(p.A.shape[1]);
    for (int i = static_cast<int>(threadIdx.x); i < kSequences * p.r; i += kManyThreads) {
        const int64_t s = min(s0 + i / p.r, p.x.shape[0] - 1);
        delta[i] = p.dbc.data[s * p.dbc.stride + i % p.r];
    }
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t s = min(s0 + warp, p.x.shape[0] - 1);
    const float* row = p.dbc.data + s * p.dbc.stride;
    for (int part = 0; part < 3; ++part) {
        float scale = 1.0f;
        if (p.normed) {
            const int begin = part == 0 ? 0 : p.r + (part - 1) * n, count = part == 0 ? p.r : n;
            float sum = 0.0f;
            for (int j = lane; j < count; j += kWarp) sum = fmaf(row[begin + j], row[begin + j], sum);
            scale = rsqrtf(warp_sum(sum) / static_cast<float>(count) + p.eps);
        }
        if (lane == 0) rstd[warp][part] = scale;
    }
}

template <class T, class W, int L, int V>
__global__ void __launch_bounds__(kManyThreads) Many(const __grid_constant__ Params<T, W> p) {
    constexpr int kChannels = kManyThreads / L, kState = 4;
    extern __shared__ __align__(16) float delta[];
    __shared__ float dt[kSequences][kChannels], rstd[kSequences][3];
    static_assert(kManyThreads / kWarp == kSequences);
    allow_next();
    const int part = static_cast<int>(threadIdx.x) % L, channel = static_cast<int>(threadIdx.x) / L;
    const int64_t d = p.A.shape[0], t = p.x.shape[0], first = static_cast<int64_t>(blockIdx.x) * kChannels,
                  s0 = static_cast<int64_t>(blockIdx.y) * kSequences;
    const bool mine = first + channel < d;
    const int64_t c = mine ? first + channel : d - 1;
    const Pack<float, kState> A = load_pack<kState>(p.A.data + c * p.A.stride + part * kState);
    const float skip = p.D != nullptr ? p.D[c] : 0.0f;
    const int64_t at = (c * L + part) * kState;
    wait_for_inputs();

    Pack<float, kState> h[kSequences];
#pragma unroll
    for (int i = 0; i < kSequences; ++i)
        if (s0 + i < t) h[i] = load_pack<kState>(p.state_of(s0 + i) + at);
    load_deltas(p, s0, delta, rstd);
    __syncthreads();
    step_sizes<T, W, kChannels, V>(p, first, s0, delta, rstd, dt);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSequences; ++i) {
        const int64_t s = s0 + i;
        if (s >= t) break;
        const float* B = p.dbc.data + s * p.dbc.stride + p.r + part * kState;
        const float step = dt[i][channel], x = to_float(p.x.data[s * p.x.stride + c]),
                    input = step * x * rstd[i][1];
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kState; ++k) {
            h[i].at[k] = fmaf(exp2_fast(step * kLog2E * A.at[k]), h[i].at[k], input * B[k]);
            sum = fmaf(B[L * kState + k], h[i].at[k], sum);
        }
        sum = group_sum<L>(sum * rstd[i][2]);
        if (!mine) continue;
        store_pack(p.state_of(s) + at, h[i]);
        if (part != 0) continue;
        const float z = to_float(p.z.data[s * p.z.stride + c]);
        p.y.data[s * p.y.stride + c] = from_float<T>(fmaf(skip, x, sum) * silu(z));
    }
}

// ---- Launching ----

template <class T, class W, int L, int V>
void launch_many(const Exec& ex, const Params<T, W>& p) {
    constexpr int kChannels = kManyThreads / L;
    const dim3 blocks(blocks_for(p.A.shape[0], kChannels), blocks_for(p.x.shape[0], kSequences));
    const size_t shared = static_cast<size_t>(kSequences * p.r) * sizeof(float);
    launch_overlapped(ex, kOp, Many<T, W, L, V>, {blocks, kManyThreads, shared}, p);
}

template <class T, class W, int V>
void choose(const Exec& ex, const Params<T, W>& p) {
    constexpr int64_t kFew = 8, kMostRank = 512;
    const int64_t t = p.x.shape[0], d = p.A.shape[0], n = p.A.shape[1];
    const bool packs = packable(p.state.data, p.state.stride, 4) && packable(p.A.data, p.A.stride, 4);
    if (t > kFew && packs && p.r <= kMostRank) {
        if (n == 16) return launch_many<T, W, 4, V>(ex, p);
        if (n == 32) return launch_many<T, W, 8, V>(ex, p);
    }
    const dim3 blocks(blocks_for(d * kLanes, kFewThreads), static_cast<unsigned>(t));
    launch_overlapped(ex, kOp, Few<T, W, V>, {blocks, kFewThreads}, p);
}

template <class T, class W>
void run(const Exec& ex, const MambaStepInputs& in, View<float, 3> state, const Tensor& y) {
    constexpr int V = 16 / sizeof(W);
    const Tensor& weight = in.dt_weight.weight();
    const Params<T, W> p{.x = in.x.view<const T, 2>(),
                         .z = in.z.view<const T, 2>(),
                         .dbc = in.dbc.view<const float, 2>(),
                         .weight = reinterpret_cast<const W*>(weight.raw()),
                         .weight_stride = weight.stride(),
                         .bias = in.dt_bias.data,
                         .D = in.D.data,
                         .A = in.A,
                         .state = state,
                         .slots = in.slots.data,
                         .y = y.view<T, 2>(),
                         .r = static_cast<int>(weight.dim(1)),
                         .normed = in.norm_eps.has_value(),
                         .eps = in.norm_eps.value_or(0.0f)};
    if (p.r % V == 0 && packable(p.weight, p.weight_stride, V) && packable(p.dbc.data, p.dbc.stride, 4)) {
        choose<T, W, V>(ex, p);
    } else {
        choose<T, W, 1>(ex, p);
    }
}

}  // namespace

void mamba_step(const Exec& ex, const MambaStepInputs& in, View<float, 3> state, const Tensor& y) {
    const bool w16 = in.dt_weight.weight().dtype() == DType::bf16;
    dispatch_activation(in.x.dtype(), kOp, [&]<class T>() {
        if (w16) {
            run<T, bf16>(ex, in, state, y);
        } else {
            run<T, float>(ex, in, state, y);
        }
    });
}

}  // namespace ssm::cuda
