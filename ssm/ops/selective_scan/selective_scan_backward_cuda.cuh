// The walks of a tile of the selective scan's gradient; selective_scan_cuda.cuh says who owns what. A tile is
// walked twice: up in time from the state that enters it, keeping q = exp(dt A) h[t-1] of every other token
// in shared memory (h is q + dt u B, one multiply-add), then down with gh, the gradient of the state. exp(dt
// A) is computed both times: keeping it would cost shared memory, and with it blocks of a multiprocessor.
#pragma once

#include "ssm/ops/selective_scan/selective_scan_cuda.cuh"

namespace ssm::cuda {

template <class T>
struct BackwardParams {
    View<const T, 2> u, z, grad_y;
    View<const float, 2> delta, A, B, C;
    const float* D;
    const float* bias;
    bool softplus;
    Segments segments, first_tile;  // first_tile.first: of the sequences' tiles
    int64_t d_blocks;
    const float* states;    // [tiles d n]: entering each tile of kTile tokens
    const float* entering;  // gradients from later tokens: [segments d n] when split, else [s d n]; or absent
    View<T, 2> grad_u, grad_z;
    View<float, 2> grad_delta;
    SelectiveScanSet set;
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
struct BackwardIncoming {
    PairTile<T, K, S> u, z, grad_y;
    PairTile<float, K, S> delta;
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
        for (int i = 0; i < kPairs; ++i) g[i] = mine ? to_float(grad_y.at[i]) : 0.0f;
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

template <int K, int S>
struct BackwardShared {
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
struct BackwardWalk {
    BackwardShared<K, S>& m;
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

}  // namespace ssm::cuda
