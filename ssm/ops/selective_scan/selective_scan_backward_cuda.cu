// CUDA kernels of the selective scan's gradient; selective_scan_cuda.cuh says who owns what. A tile is walked
// twice: up in time from the state that enters it, keeping q = exp(dt A) h[t-1] in shared memory (h is q +
// dt u B, one multiply-add), then down with gh, the gradient of the state. exp(dt A) is computed both times:
// keeping it would double the shared memory and halve the blocks of a multiprocessor.
#include <type_traits>

#include "ssm/ops/selective_scan/selective_scan_cuda.cuh"

namespace ssm::cuda {
namespace {

template <class T>
struct BackwardParams {
    View<const T, 2> u, z;
    View<const float, 2> delta, A, B, C, grad_y;
    const float* D;
    const float* bias;
    bool softplus;
    Segments segments, first_tile;  // first_tile.first: of the sequences' tiles
    int64_t d_blocks;
    const float* states;    // [tiles d n]: entering each tile of kTile tokens
    const float* entering;  // gradients from later tokens: [segments d n] when split, else [s d n]; or absent
    View<float, 2> grad_u, grad_delta, grad_z;
    SelectiveScanGradients::Set set;
    float* grad_initial;  // [s d n]
    // Sums are left in pieces: over the channels of a block [d_blocks t 2 n] (B, then C), over the tokens of
    // a segment [segments d n] and [2 segments d] (D, then delta_bias).
    float* rows;
    float* states_A;
    float* channels;
    float* ends;  // pass before a split: see Reverse
    float* sums;
};

template <class T, int K, int S>
struct Incoming {
    PairTile<T, K, S> u, z;
    PairTile<float, K, S> delta, grad_y;
    RowTile<K, S> B, C;
    float state[K];

    template <bool kAll>
    __device__ void load(const BackwardParams<T>& p, int64_t t0, int64_t end, int64_t d0) {
        const int count = static_cast<int>(end - t0 < kTile ? end - t0 : kTile);
        delta.load(p.delta, t0, count, d0);
        z.load(p.z, t0, count, d0);
        grad_y.load(p.grad_y, t0, count, d0);
        C.load(p.C, t0, count);
        if constexpr (kAll) {
            u.load(p.u, t0, count, d0);
            B.load(p.B, t0, count);
        }
    }
    // Of what silu(z) gates: 0 where no such pair exists.
    __device__ void gradients(float (&g)[Block<K, S>::kPairs], bool gated, bool mine, int count) const {
        constexpr int kPairs = Block<K, S>::kPairs;
        const int first = static_cast<int>(threadIdx.x) / Block<K, S>::kChannels;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) g[i] = mine ? grad_y.at[i] : 0.0f;
        if (gated) {
#pragma unroll
            for (int i = 0; i < kPairs; ++i) g[i] *= silu_fast(to_float(z.at[i]));
        }
        if (count >= kTile) return;
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            if (first + i * S >= count) g[i] = 0.0f;
    }
};

// What a split needs first: the gradient of the state before each segment if nothing came from later tokens.
template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads) Reverse(const __grid_constant__ BackwardParams<T> p) {
    constexpr int kChannels = Block<K, S>::kChannels;
    __shared__ float2 step[kTile][kChannels];  // dt, gradient
    __shared__ alignas(16) float rows[kTile][K * S];
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    if (span.first) return;  // nobody asks for it
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kChannels;
    const int channel = static_cast<int>(threadIdx.x) / S, part = static_cast<int>(threadIdx.x) % S;
    const int pair_channel = static_cast<int>(threadIdx.x) % kChannels,
              pair_first = static_cast<int>(threadIdx.x) / kChannels;
    const float bias = p.bias != nullptr && d0 + pair_channel < d ? p.bias[d0 + pair_channel] : 0.0f;
    float A[K], gh[K] = {}, sum = 0.0f;
    load_states(A, p.A.data + (d0 + channel) * (p.A.stride - n), d0 + channel, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) A[k] *= kLog2E;
    Incoming<T, K, S> x;
    int64_t t0 = span.begin + (span.end - span.begin - 1) / kTile * kTile;
    x.template load<false>(p, t0, span.end, d0);
    for (; t0 >= span.begin; t0 -= kTile) {
        const int count = static_cast<int>(span.end - t0 < kTile ? span.end - t0 : kTile);
        float dt[Block<K, S>::kPairs], g[Block<K, S>::kPairs];
        steps_of<K, S>(dt, x.delta, bias, p.softplus, count);
        x.gradients(g, p.z.data != nullptr, true, count);
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i) step[pair_first + i * S][pair_channel] = {dt[i], g[i]};
        x.C.store(&rows[0][0], n);
        __syncthreads();
        if (t0 > span.begin) x.template load<false>(p, t0 - kTile, span.end, d0);
#pragma unroll 8
        for (int t = kTile - 1; t >= 0; --t) {
            const float2 s = step[t][channel];
            float C[K];
            load_row(C, &rows[t][part * K]);
            sum += s.x;
#pragma unroll
            for (int k = 0; k < K; ++k) gh[k] = exp2_fast(s.x * A[k]) * fmaf(s.y, C[k], gh[k]);
        }
        __syncthreads();
    }
    store_states(p.ends + span.index * d * n, gh, d0 + channel, d, n, part);
    if (part == 0 && d0 + channel < d) p.sums[span.index * d + d0 + channel] = sum;
}

template <int K, int S>
struct Shared {
    static constexpr int kWarps = kThreads / kWarp;
    Pack<float, K> q[kTile / 2][kThreads];          // of even tokens; the next one's is decay h
    float2 step[kTile][Block<K, S>::kChannels];     // dt, dt u
    float2 sums[kTile][Block<K, S>::kChannels];     // on the way down: gh B, e A
    float gradient[kTile][Block<K, S>::kChannels];  // on the way down replaced by C h
    float B[kTile][K * S], C[kTile][K * S];
    float rows[kTile][kWarps][2 * K * S];  // gradients of B and C, summed over the warp's channels
};

// Sums of 2 K values over the warp's channels: each lane is left with kLeft of them, those from its
// (lane / S) kLeft-th on. Halves are swapped, so that every sum is computed once.
template <int K, int S>
struct ChannelSums {
    static constexpr int kLeft = 2 * K * S / kWarp;
    float v[2 * K];  // B, then C

    __device__ void sum(int lane) {
        int half = K;
#pragma unroll
        for (int offset = kWarp / 2; offset >= S; offset /= 2) {
            const bool upper = (lane & offset) != 0;
#pragma unroll
            for (int i = 0; i < K; ++i) {
                if (i >= half) break;
                const float keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
                v[i] = keep + __shfl_xor_sync(kAllLanes, send, offset);
            }
            half /= 2;
        }
    }
    __device__ void store(float* row, int lane) const {
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
            const int which = lane / S * kLeft + i;
            row[which / K * K * S + lane % S * K + which % K] = v[i];
        }
    }
};

template <class T, int K, int S>
struct Walk {
    Shared<K, S>& m;
    const BackwardParams<T>& p;
    int channel, part, lane, warp;
    float A[K], gh[K], gA[K];

    // Groups of tokens are read before what the last group leaves is written: the compiler cannot know that
    // the two are apart, and would wait for each token.
    template <int N>
    struct Group {
        float2 step[N];
        float B[N][K], C[N][K], gradient[N], decay[N][K];
        Pack<float, K> q[(N + 1) / 2];
    };
    template <bool kDown, int N>
    __device__ void load(Group<N>& to, int t) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            to.step[i] = m.step[t + i][channel];
            load_row(to.B[i], &m.B[t + i][part * K]);
            if constexpr (kDown) {
                load_row(to.C[i], &m.C[t + i][part * K]);
                to.gradient[i] = m.gradient[t + i][channel];
                if (i % 2 == 0) to.q[i / 2] = m.q[(t + i) / 2][threadIdx.x];
            }
        }
    }
    __device__ void up(const float (&state)[K]) {
        constexpr int N = 2;
        float h[K];
#pragma unroll
        for (int k = 0; k < K; ++k) h[k] = state[k];
        Group<N> now, next, later;
        load<false>(now, 0);
        load<false>(next, N);
#pragma unroll
        for (int i = 0; i < N; ++i) decays(now, i);
#pragma unroll
        for (int t = 0; t < kTile; t += N) {
            if (t + 2 * N < kTile) load<false>(later, t + 2 * N);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (t + N < kTile) decays(next, i);
                Pack<float, K> q;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    q.at[k] = now.decay[i][k] * h[k];
                    h[k] = fmaf(now.step[i].y, now.B[i][k], q.at[k]);
                }
                if (i % 2 == 0) m.q[(t + i) / 2][threadIdx.x] = q;
            }
            now = next;
            next = later;
        }
    }
    template <int N>
    __device__ void decays(Group<N>& x, int i) const {
#pragma unroll
        for (int k = 0; k < K; ++k) x.decay[i][k] = exp2_fast(x.step[i].x * A[k]);
    }
    // Tokens t and t + 1.
    __device__ void down(const Group<2>& x, Group<2>& next, int t) {
        float sums[2][3] = {};  // C h, gh B, e A over the thread's states
        ChannelSums<K, S> rows[2];
        float h[2][K], q[2][K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            q[0][k] = x.q[0].at[k];
            h[0][k] = fmaf(x.step[0].y, x.B[0][k], q[0][k]);
            q[1][k] = x.decay[1][k] * h[0][k];
            h[1][k] = fmaf(x.step[1].y, x.B[1][k], q[1][k]);
        }
#pragma unroll
        for (int i = 1; i >= 0; --i) {
            const float2 s = x.step[i];
            const float g = x.gradient[i];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                gh[k] = fmaf(g, x.C[i][k], gh[k]);
                const float e = gh[k] * q[i][k];
                sums[i][0] = fmaf(x.C[i][k], h[i][k], sums[i][0]);
                sums[i][1] = fmaf(gh[k], x.B[i][k], sums[i][1]);
                sums[i][2] = fmaf(e, A[k], sums[i][2]);
                gA[k] = fmaf(s.x, e, gA[k]);
                rows[i].v[k] = gh[k] * s.y;
                rows[i].v[K + k] = g * h[i][k];
                gh[k] *= x.decay[i][k];
            }
            decays(next, i);
        }
        rows[0].sum(lane), rows[1].sum(lane);
        rows[0].store(m.rows[t][warp], lane), rows[1].store(m.rows[t + 1][warp], lane);
        store_sums(sums, t);
    }
    // Sums over the channel's parts; the lower half of them ends with token t's, the upper with the next
    // one's.
    __device__ void store_sums(const float (&sums)[2][3], int t) {
        const bool upper = part >= S / 2;
        float v[3];
#pragma unroll
        for (int j = 0; j < 3; ++j)
            v[j] = (upper ? sums[1][j] : sums[0][j]) +
                   __shfl_xor_sync(kAllLanes, upper ? sums[0][j] : sums[1][j], S / 2);
#pragma unroll
        for (int offset = S / 4; offset > 0; offset /= 2) {
#pragma unroll
            for (int j = 0; j < 3; ++j) v[j] += __shfl_xor_sync(kAllLanes, v[j], offset);
        }
        if (part % (S / 2) != 0) return;
        m.gradient[t + upper][channel] = v[0];
        m.sums[t + upper][channel] = {v[1], v[2]};
    }
    __device__ void down() {
        constexpr int N = 2;
        Group<N> now, next;
        load<true>(now, kTile - N);
#pragma unroll
        for (int i = 0; i < N; ++i) decays(now, i);
#pragma unroll 4
        for (int t = kTile - N; t >= 0; t -= N) {
            load<true>(next, t >= N ? t - N : 0);
            down(now, next, t);
            now = next;
        }
    }
};

// What tiles leave to a (token, channel) pair's thread: the channel's sums over time.
struct ChannelGradients {
    float D = 0.0f, bias = 0.0f;
};

__device__ inline void give(const View<float, 2>& to, int64_t t, int64_t c, float value, bool set) {
    if (to.data == nullptr) return;
    float* at = to.data + t * to.stride + c;
    *at = set ? value : *at + value;
}

// The thread's pairs of a tile, to a matrix of gradients.
template <int K, int S>
__device__ inline void give_pairs(const View<float, 2>& to, int64_t t0, int count, int64_t d0,
                                  const float (&value)[Block<K, S>::kPairs], bool set) {
    constexpr int kChannels = Block<K, S>::kChannels;
    if (to.data == nullptr) return;
    const int first = static_cast<int>(threadIdx.x) / kChannels;
    float* at = to.data + (t0 + first) * to.stride + d0 + static_cast<int>(threadIdx.x) % kChannels;
    const int64_t apart = S * to.stride;
    if (set) {
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i, at += apart)
            if (first + i * S < count) *at = value[i];
    } else {
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i, at += apart)
            if (first + i * S < count) *at += value[i];
    }
}

template <class T, int K, int S>
__device__ inline void finish_pairs(const BackwardParams<T>& p, const Shared<K, S>& m, int64_t t0, int count,
                                    int64_t d0, float bias, float D, ChannelGradients& sums) {
    constexpr int kChannels = Block<K, S>::kChannels, kPairs = Block<K, S>::kPairs;
    const int channel = static_cast<int>(threadIdx.x) % kChannels,
              first = static_cast<int>(threadIdx.x) / kChannels;
    if (d0 + channel >= p.u.shape[1]) return;
    float gu[kPairs], gdelta[kPairs], gz[kPairs];
    PairTile<T, K, S> us, zs;
    PairTile<float, K, S> deltas, grads;  // read again: kept, they would cost a block its registers
    us.load(p.u, t0, count, d0), zs.load(p.z, t0, count, d0);
    deltas.load(p.delta, t0, count, d0), grads.load(p.grad_y, t0, count, d0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int t = first + i * S;
        const float u = to_float(us.at[i]), y = fmaf(D, u, m.gradient[t][channel]);
        const float2 s = m.sums[t][channel];
        float g = grads.at[i];
        if (p.z.data != nullptr) {
            const float z = to_float(zs.at[i]), slope = sigmoid_fast(z);
            gz[i] = g * y * silu_slope(z, slope);
            g *= z * slope;
        }
        gu[i] = fmaf(D, g, m.step[t][channel].x * s.x);
        gdelta[i] = fmaf(u, s.x, s.y * kLn2);
        if (t < count) sums.D = fmaf(g, u, sums.D);
    }
    if (p.softplus) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) gdelta[i] *= sigmoid_fast(deltas.at[i] + bias);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sums.bias += first + i * S < count ? gdelta[i] : 0.0f;
    give_pairs<K, S>(p.grad_u, t0, count, d0, gu, p.set.u);
    give_pairs<K, S>(p.grad_delta, t0, count, d0, gdelta, p.set.delta);
    give_pairs<K, S>(p.grad_z, t0, count, d0, gz, p.set.z);
}

template <class T, int K, int S>
__device__ inline void finish_rows(const BackwardParams<T>& p, const Shared<K, S>& m, int64_t t0, int count) {
    constexpr int kStates = K * S;
    const int n = static_cast<int>(p.A.shape[1]);
    float* to = p.rows + (blockIdx.x % p.d_blocks * p.u.shape[0] + t0) * 2 * n;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kTile * 2 * kStates; i += kThreads) {
        const int t = i / (2 * kStates), j = i % (2 * kStates);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Shared<K, S>::kWarps; ++w) sum += m.rows[t][w][j];
        if (t < count && j % kStates < n) to[t * 2 * n + j / kStates * n + j % kStates] = sum;
    }
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, S == 4 ? 3 : 2)
    Backward(const __grid_constant__ BackwardParams<T> p) {
    constexpr int kChannels = Block<K, S>::kChannels;
    extern __shared__ float4 memory[];
    auto& m = *reinterpret_cast<Shared<K, S>*>(memory);
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kChannels;
    const int pair_channel = thread % kChannels, pair_first = thread / kChannels;
    const bool mine = d0 + pair_channel < d;
    const float bias = p.bias != nullptr && mine ? p.bias[d0 + pair_channel] : 0.0f,
                D = p.D != nullptr && mine ? p.D[d0 + pair_channel] : 0.0f;
    Walk<T, K, S> walk{m, p, thread / S, thread % S, thread % kWarp, thread / kWarp, {}, {}, {}};
    const int64_t c = d0 + walk.channel;
    const int part = walk.part;
    load_states(walk.A, p.A.data + c * (p.A.stride - n), c, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) walk.A[k] *= kLog2E;
    const int64_t row = p.segments.split ? span.index : span.sequence;
    load_states(walk.gh, p.entering != nullptr ? p.entering + row * d * n : nullptr, c, d, n, part);
    ChannelGradients sums;
    const int64_t first_tile = p.first_tile.first.offset(span.sequence);
    Incoming<T, K, S> x;
    const auto load = [&](Incoming<T, K, S>& to, int64_t t0) {
        to.template load<true>(p, t0, span.end, d0);
        load_states(to.state, p.states + (first_tile + (t0 - span.start) / kTile) * d * n, c, d, n, part);
    };
    const int64_t last = span.begin + (span.end - span.begin - 1) / kTile * kTile;
    if (span.end > span.begin) load(x, last);
    for (int64_t t0 = last; t0 >= span.begin && span.end > span.begin; t0 -= kTile) {
        const int count = static_cast<int>(span.end - t0 < kTile ? span.end - t0 : kTile);
        float dt[Block<K, S>::kPairs], g[Block<K, S>::kPairs];
        steps_of<K, S>(dt, x.delta, bias, p.softplus, count);
        x.gradients(g, p.z.data != nullptr, mine, count);
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i) {
            m.step[pair_first + i * S][pair_channel] = {dt[i], dt[i] * to_float(x.u.at[i])};
            m.gradient[pair_first + i * S][pair_channel] = g[i];
        }
        x.B.store(&m.B[0][0], n);
        x.C.store(&m.C[0][0], n);
        __syncthreads();
        walk.up(x.state);
        if (t0 > span.begin) load(x, t0 - kTile);
        walk.down();
        __syncthreads();
        finish_pairs(p, m, t0, count, d0, bias, D, sums);
        if (p.rows != nullptr) finish_rows(p, m, t0, count);
        __syncthreads();
    }
    if (p.grad_initial != nullptr && span.first && c < d) {
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (part * K + k < n) p.grad_initial[(span.sequence * d + c) * n + part * K + k] += walk.gh[k];
    }
    if (p.states_A != nullptr) store_states(p.states_A + span.index * d * n, walk.gA, c, d, n, part);
    if (p.channels == nullptr) return;
    // Threads of one channel: kChannels apart.
    auto* both = reinterpret_cast<float2*>(memory);
    both[thread] = {sums.D, sums.bias};
    __syncthreads();
    if (thread >= kChannels || !mine) return;
    float2 sum{};
    for (int i = thread; i < kThreads; i += kChannels) sum.x += both[i].x, sum.y += both[i].y;
    p.channels[2 * span.index * d + d0 + thread] = sum.x;
    p.channels[(2 * span.index + 1) * d + d0 + thread] = sum.y;
}

// to[r][j] <- (set ? 0 : to[r][j]) + sum over i < count of from[i][r][j], in the order of i.
struct SumParams {
    const float* from;
    int64_t count, apart, from_stride;  // elements between two i and between two r
    View<float, 2> to;
    bool set;
};
__global__ void __launch_bounds__(kThreads) Sum(const __grid_constant__ SumParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n = p.to.shape[1];
    if (i >= p.to.shape[0] * n) return;
    const int64_t r = i / n, j = i % n;
    const float* from = p.from + r * p.from_stride + j;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t k = 0; k < p.count; ++k) sum += from[k * p.apart];
    give(p.to, r, j, sum, p.set);
}

void sum(const Exec& ex, const SumParams& p) {
    if (p.to.data == nullptr || p.to.size() == 0) return;
    Sum<<<blocks_for(p.to.size(), kThreads), kThreads, 0, stream_of(ex)>>>(p);
    check_launch("selective_scan_backward");
}

template <class T>
BackwardParams<T> make_params(const SelectiveScanInputs<T>& in, View<const float, 2> grad_y,
                              const SelectiveScanGradients& grad) {
    BackwardParams<T> p{};
    require_stride(in.u), require_stride(in.z), require_stride(in.delta), require_stride(grad_y);
    require_stride(in.B), require_stride(in.C);
    p.u = in.u, p.z = in.z, p.delta = in.delta, p.A = in.A, p.B = in.B, p.C = in.C, p.grad_y = grad_y;
    p.D = in.D.data, p.bias = in.delta_bias.data, p.softplus = in.delta_softplus;
    p.grad_u = grad.u, p.grad_delta = grad.delta, p.grad_z = grad.z, p.set = grad.set;
    p.grad_initial = grad.initial_state.data;
    return p;
}

template <class T, int K, int S>
void run_backward(const Exec& ex, BackwardParams<T> p, CuSeqlens cu, View<const float, 3> grad_final_state,
                  const SelectiveScanGradients& grad, const SelectiveScanOptions& options) {
    const int64_t t = p.u.shape[0], d = p.A.shape[0], n = p.A.shape[1],
                  s = static_cast<int64_t>(cu.size()) - 1;
    p.d_blocks = (d + Block<K, S>::kChannels - 1) / Block<K, S>::kChannels;
    const SegmentsOnDevice segments(ex, cu, p.d_blocks,
                                    selective_scan_want(ex, options, p.d_blocks * s, 2, 9));
    p.segments = segments.get();
    const auto count = static_cast<size_t>(segments.count()), dn = static_cast<size_t>(d * n);
    const size_t split = p.segments.split ? count : 0;
    const auto blocks = static_cast<unsigned>(segments.count() * p.d_blocks);
    const Scratch<float> ends(ex, split * dn), sums(ex, split * static_cast<size_t>(d)),
        rows(ex, grad.B || grad.C ? static_cast<size_t>(p.d_blocks * t * 2 * n) : 0),
        states_A(ex, grad.A ? count * dn : 0),
        channels(ex, grad.D || grad.delta_bias ? 2 * count * static_cast<size_t>(d) : 0);
    p.ends = ends.data(), p.sums = sums.data();
    p.rows = grad.B || grad.C ? rows.data() : nullptr;
    p.states_A = grad.A ? states_A.data() : nullptr;
    p.channels = grad.D || grad.delta_bias ? channels.data() : nullptr;
    p.entering = grad_final_state.data;
    if (split > 0) {
        Reverse<T, K, S><<<blocks, kThreads, 0, stream_of(ex)>>>(p);
        check_launch("selective_scan_backward");
        selective_scan_combine(
            ex, {p.segments, grad_final_state.data, p.A.data, p.A.stride, d, n, ends.data(), sums.data()},
            true);
        p.entering = ends.data();
    }
    constexpr int kBytes = static_cast<int>(sizeof(Shared<K, S>));
    check(cudaFuncSetAttribute(Backward<T, K, S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "selective_scan_backward");
    Backward<T, K, S><<<blocks, kThreads, kBytes, stream_of(ex)>>>(p);
    check_launch("selective_scan_backward");
    const int64_t segment_count = segments.count();
    sum(ex, {rows.data(), p.d_blocks, t * 2 * n, 2 * n, grad.B, grad.set.B});
    sum(ex, {rows.data() + n, p.d_blocks, t * 2 * n, 2 * n, grad.C, grad.set.C});
    sum(ex, {states_A.data(), segment_count, d * n, n, grad.A, false});
    sum(ex, {channels.data(), segment_count, 2 * d, 0, {grad.D.data, {1, d}, d}, false});
    sum(ex, {channels.data() + d, segment_count, 2 * d, 0, {grad.delta_bias.data, {1, d}, d}, false});
}

}  // namespace

template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const float, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients& grad,
                             const SelectiveScanOptions& options) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1];
    if (in.cu_seqlens.size() < 2 || d == 0) return;
    const std::vector<int64_t> tiles = selective_scan_first_chunks(in.cu_seqlens, kTile);
    const SequencesOnDevice first_tile(ex, tiles);
    const bool again = options.chunk != kTile;
    const Scratch<float> states(ex, again ? static_cast<size_t>(tiles.back() * d * n) : 0);
    if (again) selective_scan_states(ex, in, {states.data(), {tiles.back(), d, n}}, options);
    BackwardParams<T> p = make_params(in, grad_y, grad);
    p.first_tile.first = first_tile.get();
    p.states = again ? states.data() : chunk_states.data;
    with_block(n, [&](auto k, auto parts) {
        run_backward<T, decltype(k)::value, decltype(parts)::value>(ex, p, in.cu_seqlens, grad_final_state,
                                                                    grad, options);
    });
}

template void selective_scan_backward(const Exec&, const SelectiveScanInputs<float>&, View<const float, 3>,
                                      View<const float, 2>, View<const float, 3>,
                                      const SelectiveScanGradients&, const SelectiveScanOptions&);
template void selective_scan_backward(const Exec&, const SelectiveScanInputs<bf16>&, View<const float, 3>,
                                      View<const float, 2>, View<const float, 3>,
                                      const SelectiveScanGradients&, const SelectiveScanOptions&);

}  // namespace ssm::cuda
