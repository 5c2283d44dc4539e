// CUDA kernels of mamba_step. Few sequences: 16 lanes take a channel of one; each holds a part of the row of
// W_dt and every 16th state. Many: a block takes 64 channels of 4 or 8 sequences; step sizes first, by the
// tensor cores where W_dt is bf16, while the states, 4 a lane, are under way; W_dt and A then serve all its
// sequences.
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

constexpr int kManyThreads = 256, kManyWarps = kManyThreads / kWarp, kState = 4;
constexpr int kTile = 16, kTokens = 8, kRun = 32, kQuarter = 8;  // of an m16n8k16 product, as in norm_linear

template <int S, int kChannels>
struct Shared {
    // Step sizes' products: warps with the same channels share W_dt's columns. Padded: no bank conflicts.
    static constexpr int kParts = kManyWarps * kTile / kChannels, kStride = kChannels + 4;
    float dots[kParts][kTokens][kStride], rstd[S][3];
    static_assert(kParts >= 1);
};

// 16 channels by up to 8 sequences on the tensor cores; a lane's fragments are 8 neighbouring columns.
template <class T, int S, int kChannels>
struct Products {
    static constexpr int kParts = Shared<S, kChannels>::kParts, kHeld = 2;
    Words<bf16, kQuarter> upper[kHeld], lower[kHeld];  // the first runs of 32 columns
    const bf16 *upper_row, *lower_row;

    __device__ static int run_of(int u) {
        return static_cast<int>(threadIdx.x) / kWarp * kTile / kChannels + u * kParts;
    }
    __device__ static int column_of(int u) { return run_of(u) * kRun + threadIdx.x % 4 * kQuarter; }

    __device__ void fetch(const Params<T, bf16>& p, int64_t first) {
        const int64_t last = p.A.shape[0] - 1,
                      c = first + threadIdx.x / kWarp * kTile % kChannels + threadIdx.x % kWarp / 4;
        upper_row = p.weight + min(c, last) * p.weight_stride;
        lower_row = p.weight + min(c + 8, last) * p.weight_stride;
#pragma unroll
        for (int u = 0; u < kHeld; ++u) load(p, u, upper[u], lower[u]);
    }
    __device__ void load(const Params<T, bf16>& p, int u, Words<bf16, kQuarter>& high,
                         Words<bf16, kQuarter>& low) const {
        high = low = {};
        if (column_of(u) >= p.r) return;
        high = load_words<kQuarter>(upper_row + column_of(u));
        low = load_words<kQuarter>(lower_row + column_of(u));
    }
    __device__ void run(const Params<T, bf16>& p, int64_t s0, Shared<S, kChannels>& shared) const {
        const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4, warp = threadIdx.x / kWarp;
        const bool real = g < S && s0 + g < p.x.shape[0];
        const float* delta = p.dbc.data + (real ? s0 + g : 0) * p.dbc.stride;
        float c[4] = {};
        for (int u = 0; run_of(u) * kRun < p.r; u += kHeld) {
            Words<bf16, kQuarter> high[kHeld], low[kHeld];
            Pack<float, kQuarter> x[kHeld] = {};
#pragma unroll
            for (int k = 0; k < kHeld; ++k) {
                if (u == 0) {
                    high[k] = upper[k], low[k] = lower[k];
                } else {
                    load(p, u + k, high[k], low[k]);
                }
                if (real && column_of(u + k) < p.r) x[k] = load_pack<kQuarter>(delta + column_of(u + k));
            }
#pragma unroll
            for (int k = 0; k < kHeld; ++k) {
#pragma unroll
                for (int h = 0; h < 4; h += 2)
                    multiply(c, high[k].at[h], low[k].at[h], high[k].at[h + 1], low[k].at[h + 1],
                             both(x[k].at[2 * h], x[k].at[2 * h + 1]),
                             both(x[k].at[2 * h + 2], x[k].at[2 * h + 3]));
            }
        }
        const int row = warp * kTile % kChannels + g;
        auto& to = shared.dots[warp * kTile / kChannels];
#pragma unroll
        for (int k = 0; k < 4; ++k) to[2 * q + k % 2][row + k / 2 * 8] = c[k];
    }
    __device__ static uint32_t both(float low, float high) {
        return static_cast<uint32_t>(from_float<bf16>(high).bits) << 16 | from_float<bf16>(low).bits;
    }
    __device__ static void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

template <class T, class W, int V>
__device__ inline float dot_of(const Params<T, W>& p, int64_t c, int64_t s) {
    const W* row = p.weight + c * p.weight_stride;
    const float* delta = p.dbc.data + s * p.dbc.stride;
    float dot = 0.0f;
    for (int j = 0; j < p.r; j += V) {
        const Words<W, V> w = load_words<V>(row + j);
        const Pack<float, V> in = load_pack<V>(delta + j);
#pragma unroll
        for (int k = 0; k < V; ++k) dot = fmaf(w[k], in.at[k], dot);
    }
    return dot;
}

// B and C of the block's sequences to [S][2 n]; 1 / rms of delta, B and C: a warp norms a sequence.
template <class T, class W, int S>
__device__ inline void load_B_C(const Params<T, W>& p, int64_t s0, float* B_C, float (*rstd)[3]) {
    const int n = static_cast<int>(p.A.shape[1]);
    const int64_t most = p.x.shape[0] - 1;
    for (int i = static_cast<int>(threadIdx.x); i < S * 2 * n; i += kManyThreads)
        B_C[i] = p.dbc.data[min(s0 + i / (2 * n), most) * p.dbc.stride + p.r + i % (2 * n)];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (warp >= S) return;
    const float* row = p.dbc.data + min(s0 + warp, most) * p.dbc.stride;
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

// A thread: 4 states of a channel in S sequences; it makes the step sizes, and finishes y, of S / L of them.
template <class T, class W, int L, int V, int S>
__global__ void __launch_bounds__(kManyThreads, 3) Many(const __grid_constant__ Params<T, W> p) {
    constexpr int kChannels = kManyThreads / L, kEach = S / L, n = L * kState;
    constexpr bool kProducts = sizeof(W) == 2 && V == kQuarter;
    static_assert(kEach >= 1 && S <= kTokens && S <= kManyWarps);
    __shared__ Shared<S, kChannels> shared;
    __shared__ __align__(16) float B_C[S][2 * n];
    allow_next();
    const int part = static_cast<int>(threadIdx.x) % L, channel = static_cast<int>(threadIdx.x) / L;
    const int64_t d = p.A.shape[0], t = p.x.shape[0], first = static_cast<int64_t>(blockIdx.x) * kChannels,
                  s0 = static_cast<int64_t>(blockIdx.y) * S;
    const bool mine = first + channel < d;
    const int64_t c = mine ? first + channel : d - 1, at = (c * L + part) * kState;
    Pack<float, kState> A = load_pack<kState>(p.A.data + c * p.A.stride + part * kState);
#pragma unroll
    for (int k = 0; k < kState; ++k) A.at[k] *= kLog2E;
    const float skip = p.D != nullptr ? p.D[c] : 0.0f, bias = p.bias != nullptr ? p.bias[c] : 0.0f;
    Products<T, S, kChannels> products;
    if constexpr (kProducts) products.fetch(p, first);
    wait_for_inputs();

    Pack<float, kState> h[S];
#pragma unroll
    for (int i = 0; i < S; ++i)
        if (s0 + i < t) h[i] = load_pack<kState>(p.state_of(s0 + i) + at);
    float x[kEach], z[kEach], dt[kEach], y[kEach] = {};
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const int64_t s = min(s0 + part * kEach + e, t - 1);
        x[e] = to_float(p.x.data[s * p.x.stride + c]);
        z[e] = to_float(p.z.data[s * p.z.stride + c]);
        if constexpr (!kProducts) dt[e] = dot_of<T, W, V>(p, c, s);
    }
    load_B_C<T, W, S>(p, s0, &B_C[0][0], shared.rstd);
    if constexpr (kProducts) products.run(p, s0, shared);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const int s = part * kEach + e;
        if constexpr (kProducts) {
            dt[e] = 0.0f;
#pragma unroll
            for (int k = 0; k < shared.kParts; ++k) dt[e] += shared.dots[k][s][channel];
        }
        dt[e] = softplus(dt[e] * shared.rstd[s][0] + bias);
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
        const float step = __shfl_sync(kAllLanes, dt[i % kEach], i / kEach, L),
                    input = __shfl_sync(kAllLanes, dt[i % kEach] * x[i % kEach], i / kEach, L) *
                            shared.rstd[i][1];
        if (s0 + i >= t) break;
        const Pack<float, kState> B = load_pack<kState>(&B_C[i][part * kState]),
                                  C = load_pack<kState>(&B_C[i][n + part * kState]);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kState; ++k) {
            h[i].at[k] = fmaf(exp2_fast(step * A.at[k]), h[i].at[k], input * B.at[k]);
            sum = fmaf(C.at[k], h[i].at[k], sum);
        }
        sum = group_sum<L>(sum * shared.rstd[i][2]);
        if (i / kEach == part) y[i % kEach] = sum;
        if (mine) store_pack(p.state_of(s0 + i) + at, h[i]);
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const int64_t s = s0 + part * kEach + e;
        if (mine && s < t) p.y.data[s * p.y.stride + c] = from_float<T>(fmaf(skip, x[e], y[e]) * silu(z[e]));
    }
}

// ---- Launching ----

template <class T, class W, int L, int V, int S>
void launch_many(const Exec& ex, const Params<T, W>& p) {
    const dim3 blocks(blocks_for(p.A.shape[0], kManyThreads / L), blocks_for(p.x.shape[0], S));
    launch_overlapped(ex, kOp, Many<T, W, L, V, S>, {blocks, kManyThreads}, p);
}

template <class T, class W, int V>
void choose(const Exec& ex, const Params<T, W>& p) {
    constexpr int64_t kFew = 2;
    const int64_t t = p.x.shape[0], d = p.A.shape[0], n = p.A.shape[1];
    const bool packs = packable(p.state.data, p.state.stride, 4) && packable(p.A.data, p.A.stride, 4);
    if (t > kFew && packs) {
        // Small blocks while they do not reach every multiprocessor.
        const bool small = d * 4 * t <= int64_t{kManyThreads} * 8 * 2 * ex.cuda->multiprocessors();
        if (n == 16 && small) return launch_many<T, W, 4, V, 4>(ex, p);
        if (n == 16) return launch_many<T, W, 4, V, 8>(ex, p);
        if (n == 32) return launch_many<T, W, 8, V, 8>(ex, p);
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
