// CUDA kernels of mamba_step. Few sequences: 16 lanes take a channel of one; each holds a part of the row of
// W_dt and every 16th state. Many: a block takes 64 channels (n 16) of 4 to 16 sequences; the copy unit
// brings the states to shared memory while the block makes the step sizes, by the tensor cores where W_dt is
// bf16.
#include "ssm/core/cuda/bulk.cuh"
#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/products.cuh"
#include "ssm/core/cuda/words.cuh"
#include "ssm/ops/mamba_step/mamba_step_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "mamba_step";

// S: the states' type.
template <class T, class W, class S>
struct Params {
    View<const T, 2> x, z;     // [t d]
    View<const float, 2> dbc;  // [t r+2n]
    const W* weight;           // [d r]
    int64_t weight_stride;
    const float *bias, *D;   // [d] or absent
    View<const float, 2> A;  // [d n]
    View<S, 3> state;        // [any d n]
    const int32_t* slots;    // [t] or absent
    View<T, 2> y;            // [t d]
    int r;
    bool normed;
    float eps;

    __device__ int64_t state_of(int64_t s) const { return (slots != nullptr ? slots[s] : s) * state.stride; }
};

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

template <class T, class W, class S, int V>
__global__ void __launch_bounds__(kFewThreads) Few(const __grid_constant__ Params<T, W, S> p) {
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
    S* h = p.state.data + p.state_of(s) + c * n;
    if (lane == 0) prefetch_l2(h);
    wait_for_inputs();

    const float* delta = p.dbc.data + s * p.dbc.stride;
    const float *B = delta + p.r, *C = B + n;
    const float x = to_float(p.x.data[s * p.x.stride + c]), z = to_float(p.z.data[s * p.z.stride + c]);
    float state = lane < n ? to_float(h[lane]) : 0.0f;
    const float first_B = lane < n ? B[lane] : 0.0f, first_C = lane < n ? C[lane] : 0.0f;
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
        if (j >= kLanes) state = to_float(h[j]);
        const bool first = j < kLanes;
        state = fmaf(exp2_fast(dt * kLog2E * (first ? a : A[j])), state,
                     dt * x * (first ? first_B : B[j]) * B_scale);
        h[j] = from_float<S>(state);
        sum = fmaf((first ? first_C : C[j]) * C_scale, state, sum);
    }
    sum = group_sum<kLanes>(sum);
    if (!mine || lane != 0) return;
    p.y.data[s * p.y.stride + c] = from_float<T>(fmaf(skip, x, sum) * silu(z));
}

// ---- Many sequences: n 16 or 32 ----

constexpr int kManyThreads = 256, kManyWarps = kManyThreads / kWarp;
constexpr int kTile = 16, kTokens = 8, kRun = 32, kQuarter = 8;  // of an m16n8k16 product, as in norm_linear

// What a block works on: kChannels of kSeqs sequences. L lanes take a channel's n states, 16 bytes each; all
// threads together, one after another, kRows rows of n.
template <class S, int n, int kSeqs>
struct Tiling {
    static constexpr int kChannels = 1024 / n, kStates = 16 / sizeof(S), L = n / kStates,
                         kRows = kManyThreads / L, kSeqsAtOnce = kRows / kChannels,
                         kPasses = kSeqs / kSeqsAtOnce;
    // Step sizes: tiles of 8 sequences; warps with the same channels share W_dt's columns.
    static constexpr int kTiles = (kSeqs + kTokens - 1) / kTokens, kParts = kManyWarps * kTile / kChannels;
    // Pairs of channel and sequence that a thread makes the step size of, and finishes.
    static constexpr int kSeqsOfPairs = kManyThreads / kChannels,
                         kPairs = (kSeqs + kSeqsOfPairs - 1) / kSeqsOfPairs;
    static_assert(kSeqsAtOnce >= 1 && kPasses >= 1 && kParts >= 2 && kPasses * kSeqsAtOnce == kSeqs);
};

template <class S, int n, int kSeqs>
struct Shared {
    using Of = Tiling<S, n, kSeqs>;
    alignas(128) uint4 states[kSeqs][Of::kChannels * Of::L];
    alignas(16) float B_C[kSeqs][2 * n];
    // The products' parts; then part 0 is dt and part 1 dt x, and then y's sum. Padded: no bank conflicts.
    float dots[Of::kParts][Of::kTiles * kTokens][Of::kChannels + 4];
    float rstd[kSeqs][3];
    int64_t rows[kSeqs];  // the sequences' states: offsets, so that their address is known to be global
    uint64_t arrived;
};

__device__ inline uint32_t both(float low, float high) {
    return static_cast<uint32_t>(from_float<bf16>(high).bits) << 16 | from_float<bf16>(low).bits;
}

// W_dt delta of a warp's 16 channels on the tensor cores; a lane's fragments are 8 neighbouring columns.
template <class Of>
struct Products {
    static constexpr int kHeld = 2;
    Words<bf16, kQuarter> upper[kHeld], lower[kHeld];  // the first runs of 32 columns
    const bf16 *upper_row, *lower_row;

    __device__ static int run_of(int u) {
        return static_cast<int>(threadIdx.x) / kWarp * kTile / Of::kChannels + u * Of::kParts;
    }
    __device__ static int column_of(int u) { return run_of(u) * kRun + threadIdx.x % 4 * kQuarter; }

    template <class P>
    __device__ void fetch(const P& p, int64_t first) {
        const int64_t last = p.A.shape[0] - 1,
                      c = first + threadIdx.x / kWarp * kTile % Of::kChannels + threadIdx.x % kWarp / 4;
        upper_row = p.weight + min(c, last) * p.weight_stride;
        lower_row = p.weight + min(c + 8, last) * p.weight_stride;
#pragma unroll
        for (int u = 0; u < kHeld; ++u) load(u, p.r, upper[u], lower[u]);
    }
    __device__ void load(int u, int r, Words<bf16, kQuarter>& high, Words<bf16, kQuarter>& low) const {
        high = low = {};
        if (column_of(u) >= r) return;
        high = load_words<kQuarter>(upper_row + column_of(u));
        low = load_words<kQuarter>(lower_row + column_of(u));
    }
    // `count` sequences from s0 on, to dots[part][sequence][channel].
    template <class P, class D>
    __device__ void run(const P& p, int64_t s0, int count, D& dots) const {
        const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4, warp = threadIdx.x / kWarp;
        float c[Of::kTiles][4] = {};
        for (int u = 0; run_of(u) * kRun < p.r; u += kHeld) {
#pragma unroll
            for (int k = 0; k < kHeld; ++k) {
                Words<bf16, kQuarter> high, low;
                if (u == 0) {
                    high = upper[k], low = lower[k];
                } else {
                    load(u + k, p.r, high, low);
                }
#pragma unroll
                for (int i = 0; i < Of::kTiles; ++i) {
                    Pack<float, kQuarter> x = {};
                    const int s = i * kTokens + g;
                    if (s < count && column_of(u + k) < p.r)
                        x = load_pack<kQuarter>(p.dbc.data + (s0 + s) * p.dbc.stride + column_of(u + k));
#pragma unroll
                    for (int h = 0; h < 4; h += 2)
                        multiply_bf16(c[i], high.at[h], low.at[h], high.at[h + 1], low.at[h + 1],
                                      both(x.at[2 * h], x.at[2 * h + 1]),
                                      both(x.at[2 * h + 2], x.at[2 * h + 3]));
                }
            }
        }
        const int row = warp * kTile % Of::kChannels + g;
        auto& to = dots[warp * kTile / Of::kChannels];
#pragma unroll
        for (int i = 0; i < Of::kTiles; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) to[i * kTokens + 2 * q + k % 2][row + k / 2 * 8] = c[i][k];
    }
};

template <class P>
__device__ inline float dot_of(const P& p, int64_t c, int64_t s) {
    constexpr int V = 4;
    const float* row = p.weight + c * p.weight_stride;
    const float* delta = p.dbc.data + s * p.dbc.stride;
    float dot = 0.0f;
    for (int j = 0; j < p.r; j += V) {
        const Pack<float, V> w = load_pack<V>(row + j), in = load_pack<V>(delta + j);
#pragma unroll
        for (int k = 0; k < V; ++k) dot = fmaf(w.at[k], in.at[k], dot);
    }
    return dot;
}

// B and C of the block's sequences; 1 / rms of delta, B and C: a warp norms a sequence.
template <class P, int n, int kSeqs>
__device__ inline void load_B_C(const P& p, int64_t s0, int count, float (&B_C)[kSeqs][2 * n],
                                float (&rstd)[kSeqs][3]) {
    for (int i = static_cast<int>(threadIdx.x); i < count * 2 * n; i += kManyThreads)
        B_C[i / (2 * n)][i % (2 * n)] = p.dbc.data[(s0 + i / (2 * n)) * p.dbc.stride + p.r + i % (2 * n)];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int s = warp; s < kSeqs; s += kManyWarps) {
        const float* row = p.dbc.data + (s0 + min(s, count - 1)) * p.dbc.stride;
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            float scale = 1.0f;
            if (p.normed) {
                const int begin = part == 0 ? 0 : p.r + (part - 1) * n, size = part == 0 ? p.r : n;
                float sum = 0.0f;
                for (int j = lane; j < size; j += kWarp) sum = fmaf(row[begin + j], row[begin + j], sum);
                scale = rsqrtf(warp_sum(sum) / static_cast<float>(size) + p.eps);
            }
            if (lane == 0) rstd[s][part] = scale;
        }
    }
}

// h and y of the block's states, once dt and dt x are there: y's sums take the place of dt x.
template <class P, class S, int n, int kSeqs>
__device__ inline void advance(const P& p, int64_t first, int count, const float (&A)[16 / sizeof(S)],
                               Shared<S, n, kSeqs>& shared) {
    using Of = Tiling<S, n, kSeqs>;
    constexpr int W = Of::kStates;
    const int part = static_cast<int>(threadIdx.x) % Of::L, row = static_cast<int>(threadIdx.x) / Of::L,
              channel = row % Of::kChannels;
    const bool mine = first + channel < p.A.shape[0];
    const int64_t at = (first + channel) * n + part * W;
#pragma unroll
    for (int j = 0; j < Of::kPasses; ++j) {
        const int s = j * Of::kSeqsAtOnce + row / Of::kChannels;  // the same for a warp
        if (s >= count) break;
        const auto held =
            load_words<W>(reinterpret_cast<const S*>(&shared.states[s][channel * Of::L + part]));
        const float step = shared.dots[0][s][channel], input = shared.dots[1][s][channel];
        const Pack<float, W> B = load_pack<W>(&shared.B_C[s][part * W]),
                             C = load_pack<W>(&shared.B_C[s][n + part * W]);
        float next[W], sum = 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) {
            next[k] = fmaf(exp2_fast(step * A[k]), held[k], input * B.at[k]);
            sum = fmaf(C.at[k], next[k], sum);
        }
        if (mine) store_words<W>(p.state.data + shared.rows[s] + at, to_words<S>(next));
        sum = group_sum<Of::L>(sum * shared.rstd[s][2]);
        if (part == 0) shared.dots[1][s][channel] = sum;
    }
}

// The step sizes of the thread's pairs to dots[0], times x to dots[1].
template <bool kProducts, class P, class S, int n, int kSeqs, int kPairs>
__device__ inline void make_steps(const P& p, int64_t c, int64_t s0, int count, const float (&x)[kPairs],
                                  float bias, Shared<S, n, kSeqs>& shared) {
    using Of = Tiling<S, n, kSeqs>;
    const int channel = static_cast<int>(threadIdx.x) % Of::kChannels;
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
        const int s = static_cast<int>(threadIdx.x) / Of::kChannels + e * Of::kSeqsOfPairs;
        if (s >= count) break;
        float dot = 0.0f;
        if constexpr (kProducts) {
#pragma unroll
            for (int k = 0; k < Of::kParts; ++k) dot += shared.dots[k][s][channel];
        } else {
            dot = dot_of(p, c, s0 + s);
        }
        const float dt = softplus(fmaf(dot, shared.rstd[s][0], bias));
        shared.dots[0][s][channel] = dt;
        shared.dots[1][s][channel] = dt * x[e] * shared.rstd[s][1];
    }
}

template <class T, class W, class S, int n, int kSeqs>
__global__ void __launch_bounds__(kManyThreads, 3) Many(const __grid_constant__ Params<T, W, S> p) {
    using Of = Tiling<S, n, kSeqs>;
    constexpr bool kProducts = sizeof(W) == 2;
    __shared__ Shared<S, n, kSeqs> shared;
    allow_next();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t d = p.A.shape[0], first = static_cast<int64_t>(blockIdx.x) * Of::kChannels,
                  s0 = static_cast<int64_t>(blockIdx.y) * kSeqs;
    const int count = static_cast<int>(min(p.x.shape[0] - s0, int64_t{kSeqs}));
    const auto bytes = static_cast<uint32_t>(min(d - first, int64_t{Of::kChannels}) * n * sizeof(S));
    S* row = nullptr;
    if (thread < count) {
        const int64_t at = p.state_of(s0 + thread);
        shared.rows[thread] = at;
        row = p.state.data + at + first * n;
        prefetch_l2(row, bytes);
    }
    if (thread == 0) init_barrier(&shared.arrived, count);
    float A[Of::kStates];
    const int64_t c_of_A = min(first + thread / Of::L % Of::kChannels, d - 1),
                  c = min(first + thread % Of::kChannels, d - 1);
    const auto A_words =
        load_words<Of::kStates>(p.A.data + c_of_A * p.A.stride + thread % Of::L * Of::kStates);
#pragma unroll
    for (int k = 0; k < Of::kStates; ++k) A[k] = A_words[k] * kLog2E;
    const float skip = p.D != nullptr ? p.D[c] : 0.0f, bias = p.bias != nullptr ? p.bias[c] : 0.0f;
    Products<Of> products;
    if constexpr (kProducts) products.fetch(p, first);
    __syncthreads();
    wait_for_inputs();

    if (thread < count) fetch_bulk(shared.states[thread], row, bytes, &shared.arrived);
    float x[Of::kPairs], z[Of::kPairs];
#pragma unroll
    for (int e = 0; e < Of::kPairs; ++e) {
        const int64_t s = s0 + min(thread / Of::kChannels + e * Of::kSeqsOfPairs, count - 1);
        x[e] = to_float(p.x.data[s * p.x.stride + c]);
        z[e] = to_float(p.z.data[s * p.z.stride + c]);
    }
    if constexpr (kProducts) products.run(p, s0, count, shared.dots);
    load_B_C<Params<T, W, S>, n, kSeqs>(p, s0, count, shared.B_C, shared.rstd);
    __syncthreads();
    make_steps<kProducts>(p, c, s0, count, x, bias, shared);
    __syncthreads();
    wait_barrier(&shared.arrived, 0);
    advance(p, first, count, A, shared);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Of::kPairs; ++e) {
        const int s = thread / Of::kChannels + e * Of::kSeqsOfPairs;
        if (s >= count || first + thread % Of::kChannels >= d) break;
        const float y = fmaf(skip, x[e], shared.dots[1][s][thread % Of::kChannels]) * silu(z[e]);
        p.y.data[(s0 + s) * p.y.stride + c] = from_float<T>(y);
    }
}

// ---- Launching ----

template <int n, int kSeqs, class T, class W, class S>
void launch_many(const Exec& ex, const Params<T, W, S>& p) {
    const dim3 blocks(blocks_for(p.A.shape[0], Tiling<S, n, kSeqs>::kChannels),
                      blocks_for(p.x.shape[0], kSeqs));
    launch_overlapped(ex, kOp, Many<T, W, S, n, kSeqs>, {blocks, kManyThreads}, p);
}

// Whether it was done by Many.
template <class T, class W, class S>
bool many(const Exec& ex, const Params<T, W, S>& p) {
    constexpr int64_t kFew = 2, kStates = 16 / sizeof(S);
    const int64_t t = p.x.shape[0], d = p.A.shape[0], n = p.A.shape[1];
    if (t <= kFew || (n != 16 && n != 32) || !packable(p.state.data, p.state.stride, kStates) ||
        !packable(p.A.data, p.A.stride, 4))
        return false;
    // Small blocks while they do not reach every multiprocessor.
    const bool small = d * 4 * t <= int64_t{kManyThreads} * 8 * 2 * ex.cuda->multiprocessors();
    if (n == 32) {
        launch_many<32, 8>(ex, p);
    } else if (small) {
        launch_many<16, 4>(ex, p);
    } else {
        launch_many<16, 8>(ex, p);
    }
    return true;
}

template <class T, class W, class S>
void run(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y) {
    constexpr int V = 16 / sizeof(W);
    const Tensor& weight = in.dt_weight.weight();
    const Params<T, W, S> p{.x = in.x.view<const T, 2>(),
                            .z = in.z.view<const T, 2>(),
                            .dbc = in.dbc.view<const float, 2>(),
                            .weight = reinterpret_cast<const W*>(weight.raw()),
                            .weight_stride = weight.stride(),
                            .bias = in.dt_bias.data,
                            .D = in.D.data,
                            .A = in.A,
                            .state = state.view<S, 3>(),
                            .slots = in.slots.data,
                            .y = y.view<T, 2>(),
                            .r = static_cast<int>(weight.dim(1)),
                            .normed = in.norm_eps.has_value(),
                            .eps = in.norm_eps.value_or(0.0f)};
    const dim3 blocks(blocks_for(p.A.shape[0] * kLanes, kFewThreads), static_cast<unsigned>(p.x.shape[0]));
    if (p.r % V == 0 && packable(p.weight, p.weight_stride, V) && packable(p.dbc.data, p.dbc.stride, 4)) {
        if (!many(ex, p)) launch_overlapped(ex, kOp, Few<T, W, S, V>, {blocks, kFewThreads}, p);
    } else {
        launch_overlapped(ex, kOp, Few<T, W, S, 1>, {blocks, kFewThreads}, p);
    }
}

}  // namespace

void mamba_step(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y) {
    dispatch_activation(in.x.dtype(), kOp, [&]<class T>() {
        dispatch_activation(in.dt_weight.weight().dtype(), kOp, [&]<class W>() {
            dispatch_activation(state.dtype(), kOp, [&]<class S>() { run<T, W, S>(ex, in, state, y); });
        });
    });
}

}  // namespace ssm::cuda
