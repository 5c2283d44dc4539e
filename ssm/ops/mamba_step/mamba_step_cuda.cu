// CUDA kernels of mamba_step. Few sequences: 16 lanes take a channel of one; each holds a part of the row of
// W_dt and every 16th state. Many: a warp takes 16 channels of up to 8 sequences, without a barrier; their
// states come to shared memory while it makes the step sizes, by the tensor cores where W_dt is bf16. The
// other warps of a block have the same channels, so that W_dt's rows and A may come from L1.
#include "ssm/core/cuda/async_copies.cuh"
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
    const std::byte* next;  // to be brought to L2, or absent
    int64_t next_bytes;

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

constexpr int kManyWarps = 4;             // of a block at most: each works alone
constexpr int kChannels = 16, kSeqs = 8;  // of a warp: rows and columns of m16n8k16 products
constexpr int kRun = 32, kQuarter = 8 /* of a lane */, kHeld = 4 /* runs in registers */;

// Of a warp. L lanes take a channel's n states, 16 bytes each; the warp kAtOnce channels at once.
template <class S, int n>
struct Shared {
    static constexpr int kStates = 16 / sizeof(S), L = n / kStates, kAtOnce = kWarp / L,
                         kParts = kChannels / kAtOnce;
    alignas(128) uint4 states[kSeqs][kParts][kWarp];
    alignas(16) float B_C[kSeqs][2 * n];
    alignas(16) float2 steps[kSeqs][kChannels + 2];  // dt log2 e, dt x. Padded: no bank conflicts
    alignas(16) float sums[kSeqs][kChannels + 4];    // y's
};

// The rows of W_dt of a lane 4 g + q, channels 2 g and 2 g + 1 (rows g and g + 8 of the product), and the
// deltas of sequence g: of quarter q of each run of 32 columns, so that a fragment is one load.
struct Fragments {
    Words<bf16, kQuarter> even[kHeld], odd[kHeld];
    Pack<float, kQuarter> deltas[kHeld];

    __device__ static int column_of(int u) { return u * kRun + static_cast<int>(threadIdx.x) % 4 * kQuarter; }

    __device__ void fetch_weight(const bf16* row, int64_t stride, int u, int r) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            even[k] = odd[k] = {};
            if (column_of(u + k) >= r) continue;
            even[k] = load_words<kQuarter>(row + column_of(u + k));
            odd[k] = load_words<kQuarter>(row + stride + column_of(u + k));
        }
    }
    // row: absent where there is no sequence g.
    __device__ void fetch_deltas(const float* row, int u, int r) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            deltas[k] = {};
            if (row != nullptr && column_of(u + k) < r)
                deltas[k] = load_pack<kQuarter>(row + column_of(u + k));
        }
    }
    __device__ void multiply(float (&c)[4], int u, int r) const {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            if ((u + k) * kRun >= r) break;
            const Words<bf16, kQuarter> x = to_words<bf16>(deltas[k].at);
#pragma unroll
            for (int h = 0; h < 4; h += 2)
                multiply_bf16(c, even[k].at[h], odd[k].at[h], even[k].at[h + 1], odd[k].at[h + 1], x.at[h],
                              x.at[h + 1]);
        }
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

// 1 / rms of count numbers, over 4 lanes.
__device__ inline float quad_rstd(const float* v, int count, float eps) {
    float sum = 0.0f;
    for (int j = static_cast<int>(threadIdx.x) % 4; j < count; j += 4) sum = fmaf(v[j], v[j], sum);
    return rsqrtf(group_sum<4>(sum) / static_cast<float>(count) + eps);
}

// B and C of the warp's sequences divided by their norms. `rstd`: delta's, of the sequences of put_steps.
template <class P, int n>
__device__ inline void norm_B_C(const P& p, int64_t s0, int count, float (&B_C)[kSeqs][2 * n],
                                float (&rstd)[2]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4, s = min(g, count - 1);
    const float of_delta = quad_rstd(p.dbc.data + (s0 + s) * p.dbc.stride, p.r, p.eps),
                of_B = quad_rstd(B_C[s], n, p.eps), of_C = quad_rstd(B_C[s] + n, n, p.eps);
#pragma unroll
    for (int j = 0; j < 2; ++j) rstd[j] = __shfl_sync(kAllLanes, of_delta, 4 * (2 * q + j));
    __syncwarp();
    if (g >= count) return;
    for (int j = q; j < n; j += 4) B_C[s][j] *= of_B, B_C[s][n + j] *= of_C;
}

// The block's share of the weight that is read next. Asked for when states have come, so that it does not
// stand before them: while the block works on, the memory does.
template <class P>
__device__ inline void bring_next(const P& p) {
    const int64_t share = (p.next_bytes / gridDim.x + 15) / 16 * 16, left = p.next_bytes - blockIdx.x * share;
    if (left > 0) prefetch_l2(p.next + blockIdx.x * share, static_cast<uint32_t>(min(share, left)));
}

// h and y's sums of the warp's states, from shared memory. `row`: where the states of sequence `lane` are.
template <class P, class S, int n>
__device__ inline void advance(const P& p, int64_t row, int64_t first, int count,
                               const float (&A)[Shared<S, n>::kParts][Shared<S, n>::kStates],
                               Shared<S, n>& own) {
    using U = Shared<S, n>;
    constexpr int W = U::kStates;
    const int lane = threadIdx.x % kWarp, column = lane % U::L * W;
#pragma unroll 4
    for (int s = 0; s < kSeqs; ++s) {
        if (s >= count) break;
        S* to = p.state.data + __shfl_sync(kAllLanes, row, s) + lane * W;
        const Pack<float, W> B = load_pack<W>(&own.B_C[s][column]), C = load_pack<W>(&own.B_C[s][n + column]);
#pragma unroll
        for (int part = 0; part < U::kParts; ++part) {
            const int channel = part * U::kAtOnce + lane / U::L;
            const auto held = load_words<W>(reinterpret_cast<const S*>(&own.states[s][part][lane]));
            const float2 step = own.steps[s][channel];
            float next[W], sum = 0.0f;
#pragma unroll
            for (int k = 0; k < W; ++k) {
                next[k] = fmaf(exp2_fast(step.x * A[part][k]), held[k], step.y * B.at[k]);
                sum = fmaf(C.at[k], next[k], sum);
            }
            if (first + channel < p.A.shape[0]) store_words<W>(to + part * kWarp * W, to_words<S>(next));
            sum = group_sum<U::L>(sum);
            if (lane % U::L == 0) own.sums[s][channel] = sum;
        }
    }
}

// What a lane has of its channels: A of those that it advances, the rest of those of put_steps and put_y.
template <class S, int n>
struct Constants {
    using U = Shared<S, n>;
    float A[U::kParts][U::kStates];
    float bias[2], skip[2];

    template <class P>
    __device__ Constants(const P& p, int64_t first, int64_t c) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int part = 0; part < U::kParts; ++part) {
            const int64_t channel = min(first + part * U::kAtOnce + lane / U::L, p.A.shape[0] - 1);
            const auto words =
                load_words<U::kStates>(p.A.data + channel * p.A.stride + lane % U::L * U::kStates);
#pragma unroll
            for (int k = 0; k < U::kStates; ++k) A[part][k] = words[k];
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            bias[h] = p.bias != nullptr ? p.bias[c + h] : 0.0f;
            skip[h] = p.D != nullptr ? p.D[c + h] : 0.0f;
        }
    }
};

template <class P, class S, int n>
__device__ inline void copy_B_C(const P& p, int64_t s0, int count, Shared<S, n>& own) {
    constexpr int kPacks = 2 * n / 4;
    for (int i = threadIdx.x % kWarp; i < count * kPacks; i += kWarp)
        copy16(&own.B_C[i / kPacks][i % kPacks * 4],
               p.dbc.data + (s0 + i / kPacks) * p.dbc.stride + p.r + i % kPacks * 4);
    commit_copies();
}

template <class P, class S, int n>
__device__ inline void copy_states(const P& p, int64_t row, int64_t first, int count, Shared<S, n>& own) {
    using U = Shared<S, n>;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int s = 0; s < kSeqs; ++s) {
        if (s >= count) break;
        const S* from = p.state.data + __shfl_sync(kAllLanes, row, s) + lane * U::kStates;
#pragma unroll
        for (int part = 0; part < U::kParts; ++part)
            if (first + part * U::kAtOnce + lane / U::L < p.A.shape[0])
                copy16(&own.states[s][part][lane], from + part * kWarp * U::kStates);
    }
    commit_copies();
}

// dt log2 e and dt x. Lane 4 g + q has W_dt delta, of sequences 2 q and 2 q + 1, for channels 2 g (dots 0, 1)
// and 2 g + 1 (dots 2, 3).
template <class T, class S, int n>
__device__ inline void put_steps(const float (&dots)[4], const float (&rstd)[2], const float (&bias)[2],
                                 const Words<T, 2> (&x)[2], Shared<S, n>& own) {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float even = softplus(fmaf(dots[j], rstd[j], bias[0])),
                    odd = softplus(fmaf(dots[2 + j], rstd[j], bias[1]));
        *reinterpret_cast<float4*>(&own.steps[2 * q + j][2 * g]) =
            make_float4(even * kLog2E, even * x[j][0], odd * kLog2E, odd * x[j][1]);
    }
}

// Of the channels and sequences as in put_steps.
template <class P, class T, class S, int n>
__device__ inline void put_y(const P& p, int64_t s0, int64_t c, int count, const float (&skip)[2],
                             const Words<T, 2> (&x)[2], const Words<T, 2> (&z)[2], const Shared<S, n>& own) {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int s = 2 * q + j;
        if (s >= count) continue;
        const float2 sums = *reinterpret_cast<const float2*>(&own.sums[s][2 * g]);
        Pack<T, 2> y;
        y.at[0] = from_float<T>(fmaf(skip[0], x[j][0], sums.x) * silu(z[j][0]));
        y.at[1] = from_float<T>(fmaf(skip[1], x[j][1], sums.y) * silu(z[j][1]));
        store_pack(p.y.data + (s0 + s) * p.y.stride + c, y);
    }
}

template <class T, class W, class S, int n>
__global__ void __launch_bounds__(kManyWarps* kWarp, 4)
    Many(const __grid_constant__ Params<T, W, S> p, const int seqs) {
    using U = Shared<S, n>;
    constexpr bool kProducts = sizeof(W) == 2;
    extern __shared__ __align__(128) unsigned char memory[];
    U& own = reinterpret_cast<U*>(memory)[threadIdx.x / kWarp];
    allow_next();
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    const int64_t d = p.A.shape[0], groups = (d + kChannels - 1) / kChannels,
                  first = blockIdx.x % groups * kChannels, c = min(first + 2 * g, d - 2),
                  s0 = (blockIdx.x / groups * (blockDim.x / kWarp) + threadIdx.x / kWarp) * seqs;
    if (s0 >= p.x.shape[0]) return wait_for_inputs();
    const int count = static_cast<int>(min(p.x.shape[0] - s0, static_cast<int64_t>(seqs)));
    const int64_t row = p.state_of(s0 + min(lane, count - 1)) + first * n;  // of lane's sequence
    const W* weight = p.weight + c * p.weight_stride;
    Fragments fragments;
    if constexpr (kProducts) fragments.fetch_weight(weight, p.weight_stride, 0, p.r);
    const Constants<S, n> constants(p, first, c);
    // After the loads that need no slot: a warp asks in order, and would wait for the slot first.
    if (lane < count)
        prefetch_l2(p.state.data + row,
                    static_cast<uint32_t>(min(d - first, int64_t{kChannels}) * n * sizeof(S)));
    wait_for_inputs();

    // All that is to be read is asked for at once, first what is waited for first.
    copy_B_C(p, s0, count, own);
    const float* delta = g < count ? p.dbc.data + (s0 + g) * p.dbc.stride : nullptr;
    if constexpr (kProducts) fragments.fetch_deltas(delta, 0, p.r);
    Words<T, 2> x[2], z[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int64_t s = s0 + min(2 * q + j, count - 1);
        x[j] = load_words<2>(p.x.data + s * p.x.stride + c);
        z[j] = load_words<2>(p.z.data + s * p.z.stride + c);
    }
    copy_states(p, row, first, count, own);
    float dots[4] = {}, rstd[2] = {1.0f, 1.0f};
    if constexpr (kProducts) {
        fragments.multiply(dots, 0, p.r);
        for (int u = kHeld; u * kRun < p.r; u += kHeld) {
            fragments.fetch_weight(weight, p.weight_stride, u, p.r);
            fragments.fetch_deltas(delta, u, p.r);
            fragments.multiply(dots, u, p.r);
        }
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) dots[k] = dot_of(p, c + k / 2, s0 + min(2 * q + k % 2, count - 1));
    }
    wait_copies_but<1>();
    __syncwarp();
    if (p.normed) norm_B_C<Params<T, W, S>, n>(p, s0, count, own.B_C, rstd);
    put_steps(dots, rstd, constants.bias, x, own);
    wait_copies_but<0>();
    __syncwarp();
    if (threadIdx.x == 0) bring_next(p);
    advance(p, row, first, count, constants.A, own);
    __syncwarp();
    if (first + 2 * g < d) put_y(p, s0, c, count, constants.skip, x, z, own);
}

// ---- Launching ----

template <int n, class T, class W, class S>
void launch_many(const Exec& ex, const Params<T, W, S>& p) {
    using U = Shared<S, n>;
    const int64_t t = p.x.shape[0], groups = blocks_for(p.A.shape[0], kChannels),
                  multiprocessors = ex.cuda->multiprocessors();
    // Fewer sequences a warp, then fewer warps a block, while they do not reach every scheduler.
    int seqs = kSeqs, warps = kManyWarps;
    const auto blocks = [&] { return groups * blocks_for(t, int64_t{seqs} * warps); };
    while (seqs > 2 && groups * blocks_for(t, seqs) < 4 * multiprocessors) seqs /= 2;
    while (warps > 1 && (t <= seqs * warps / 2 || blocks() < 2 * multiprocessors)) warps /= 2;
    const auto kernel = Many<T, W, S, n>;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kManyWarps * sizeof(U));
    check(allowed, kOp);
    launch_overlapped(
        ex, kOp, kernel,
        {static_cast<unsigned>(blocks()), static_cast<unsigned>(warps * kWarp), warps * sizeof(U)}, p, seqs);
}

// Whether it was done by Many.
template <class T, class W, class S>
bool many(const Exec& ex, const Params<T, W, S>& p) {
    constexpr int64_t kFew = 2, kStates = 16 / sizeof(S);
    const int64_t t = p.x.shape[0], d = p.A.shape[0], n = p.A.shape[1];
    const auto pairs = [](const auto& v) { return packable(v.data, v.stride, 2); };
    if (t <= kFew || (n != 16 && n != 32) || d % 2 != 0 || !pairs(p.x) || !pairs(p.z) || !pairs(p.y) ||
        !packable(p.state.data, p.state.stride, kStates) || !packable(p.A.data, p.A.stride, 4))
        return false;
    n == 32 ? launch_many<32>(ex, p) : launch_many<16>(ex, p);
    return true;
}

template <class T, class W, class S>
void run(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y) {
    constexpr int V = 16 / sizeof(W);
    const Tensor& weight = in.dt_weight.weight();
    // With few sequences the next projection asks for its weight itself, before it waits for its inputs. Half
    // of the cache: out_proj's weight of a 1.4B model, whole, is what was measured.
    constexpr int64_t kLateReaders = 5;
    const bool bring = in.next && in.x.dim(0) >= kLateReaders;
    const Params<T, W, S> p{
        .x = in.x.view<const T, 2>(),
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
        .eps = in.norm_eps.value_or(0.0f),
        .next = bring ? in.next.raw() : nullptr,
        .next_bytes =
            bring ? std::min(static_cast<int64_t>(in.next.bytes()), ex.cuda->cache_bytes() / 2) / 16 * 16
                  : 0};
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
