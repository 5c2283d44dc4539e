// The walks of a tile of the selective scan's gradient; selective_scan_cuda.cuh says who owns what. A tile is
// walked twice: up in time from the state that enters it, keeping q = exp(dt A) h[t-1] of every other token
// in shared memory (h is q + dt u B, one multiply-add), then down with gh, the gradient of the state. exp(dt
// A) is computed both times: keeping it would cost shared memory, and with it blocks of a multiprocessor.
// Gradients of B and C are sums over channels: of a warp's by the tensor cores or by shuffles, of the block's
// through shared memory, of all blocks by a kernel after this one.
#pragma once

#include "ssm/ops/selective_scan/selective_scan_tile.cuh"

namespace ssm::cuda {

template <class T>
struct BackwardParams {
    View<const T, 2> u, delta, z, grad_y;
    View<const float, 2> A, B, C;
    const float* D;
    const float* bias;
    bool softplus;
    Segments segments, first_tile;  // first_tile.first: of the sequences' tiles
    int64_t d_blocks;
    const float* states;  // [tiles d n]: entering each tile of kTile tokens
    Entering entering;    // gradients from later tokens
    View<T, 2> grad_u, grad_delta, grad_z;
    View<T, 2> y;  // absent, or once more
    SelectiveScanSet set;
    float* grad_initial;  // [s d n]
    // Sums are left in pieces: over the channels of a block [d_blocks t 2 n] (B, then C; of T: many rounded
    // sums make one), over the tokens of a segment [segments d n] and [2 segments d] (D, then delta_bias).
    T* rows;
    float* states_A;
    float* channels;
    bool paired, packed, packed_states;  // see Two, RowTile, load_states
};

template <class T, int K, int S>
struct BackwardIncoming {
    PairTile<T, K, S> u, delta, z, grad_y;
    RowTile<K, S> B, C;
    float state[K];

    __device__ void load(const BackwardParams<T>& p, int64_t t0, int count, const Channels<K, S>& c) {
        delta.load(p.delta, t0, count, c);
        z.load(p.z, t0, count, c);
        grad_y.load(p.grad_y, t0, count, c);
        C.load(p.C, t0, count, p.packed, c.whole);
        u.load(p.u, t0, count, c);
        B.load(p.B, t0, count, p.packed, c.whole);
    }
    // Of what silu(z) gates: 0 where no such pair exists.
    __device__ void gradients(float2 (&g)[Block<K, S>::kTwos], bool gated, int inside, int count) const {
        constexpr int kTwos = Block<K, S>::kTwos;
#pragma unroll
        for (int i = 0; i < kTwos; ++i) {
            const float2 v = grad_y.floats(i);
            g[i] = {inside >= 1 ? v.x : 0.0f, inside >= 2 ? v.y : 0.0f};
        }
        if (gated) {
#pragma unroll
            for (int i = 0; i < kTwos; ++i) {
                const float2 v = silu_fast(z.floats(i));
                g[i] = {g[i].x * v.x, g[i].y * v.y};
            }
        }
        if (count >= kTile) return;
#pragma unroll
        for (int i = 0; i < kTwos; ++i)
            if (Block<K, S>::token(i) >= count) g[i] = {};
    }
};

template <class T, int K, int S>
struct BackwardShared {
    // Sums over a warp's channels leave kSets rows of a token, to be added after kFlush tokens.
    static constexpr int kSets = kThreads / kWarp * (kTensor<T, K, S> ? 2 : 1),
                         kFlush = kTensor<T, K, S> ? kTile / 2 : kTile;
    static constexpr int kHalf = Block<K, S>::kChannels / 2;
    static constexpr bool kKeeps = kTensor<T, K, S>;  // in f32 it would cost a block of the multiprocessor
    Pack<float, K> q[kTile / 2][kThreads];            // of even tokens; the next one's is decay h
    Pack<float, 4> pair[kTile][2 * kHalf];            // dt, dt u, gradient; then dt, C h, gh B, e A. See slot
    float B[kTile][K * S], C[kTile][K * S];
    float rows[kFlush][kSets][2 * K * S];                    // gradients of B, then C
    Two<T> kept[kKeeps ? 3 : 1][kKeeps ? kTile : 1][kHalf];  // u, z, grad_y

    // Where a channel's pairs lie: even ones, then odd ones, so that neither the threads of two channels nor
    // a warp's eight channels meet in a bank.
    __device__ static int slot(int channel) {
        const int odd = channel % 2;
        return odd * kHalf + (channel / 2 ^ (kHalf > 4 ? odd * 4 : 0));
    }
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
    __device__ static int offset(int) { return 0; }
    __device__ void store(float* row, int lane) const {
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {
            const int which = lane / S * kLeft + i;
            row[which / K * K * S + lane % S * K + which % K] = v[i];
        }
    }
};

// The same by the tensor cores, for a warp of two times four channels, each half of them apart. Lane 16 i + 4
// part + j has states of channel 4 i + j: rows of a product are (i, part), its summed index is j, once for gh
// and once for h, and of its columns (i, part) those of the same i hold sums: of gh, the gradient of B, where
// part < 2, since only there the factor of gh is not 0, and of h, the gradient of C, in the others. Lanes j =
// 2 i leave B's, lanes j = 2 i + 1 C's.
struct ChannelProducts {
    float d[2][4];

    __device__ void multiply(const float (&gh)[4], const float (&h)[4], float for_gh, float for_h,
                             bool of_B) {
        const float x = of_B ? for_gh : 0.0f, g = of_B ? 0.0f : for_h;
#pragma unroll
        for (int k = 0; k < 4; ++k) d[0][k] = d[1][k] = 0.0f;
        multiply_tf32(d[0], gh[0], gh[1], h[0], h[1], x, g);
        multiply_tf32(d[1], gh[2], gh[3], h[2], h[3], x, g);
    }
    // Where a lane's sums lie in the rows of a token; whether it leaves any.
    __device__ static int offset(int lane) { return lane / 16 * 32 + lane % 2 * 16 + lane / 4 % 4 * 4; }
    __device__ void store(float* row, int lane) const {
        if (lane / 2 % 2 == lane / 16) store_pack(row, Pack<float, 4>{{d[0][0], d[0][2], d[1][0], d[1][2]}});
    }
};

template <class T, int K, int S>
struct BackwardWalk {
    using Memory = BackwardShared<T, K, S>;
    static constexpr bool kProducts = kTensor<T, K, S>;
    static constexpr int kPartApart = kProducts ? 4 : 1;  // lanes from part to part of a channel
    using Sums = std::conditional_t<kProducts, ChannelProducts, ChannelSums<K, S>>;
    Memory& m;
    int channel, slot, part, lane, warp;
    float A[K], gh[K], gA[K];

    __device__ explicit BackwardWalk(Memory& memory)
        : m(memory),
          lane(static_cast<int>(threadIdx.x) % kWarp),
          warp(static_cast<int>(threadIdx.x) / kWarp) {
        const int first = warp * (kWarp / S);
        channel = first + (kProducts ? lane / 16 * 4 + lane % 4 : lane / S);
        part = kProducts ? lane / 4 % 4 : lane % S;
        slot = Memory::slot(channel);
#pragma unroll
        for (int k = 0; k < K; ++k) gA[k] = 0.0f;
    }

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
            load_row(to.B[i], &m.B[t + i][part * K]);
            if constexpr (!kDown) {
                const Pack<float, 2> step = load_pack<2>(m.pair[t + i][slot].at);
                to.step[i] = {step.at[0], step.at[1]};
            } else {
                const Pack<float, 4> pair = m.pair[t + i][slot];
                to.step[i] = {pair.at[0], pair.at[1]};
                to.gradient[i] = pair.at[2];
                load_row(to.C[i], &m.C[t + i][part * K]);
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
    // Tokens low + t and the next.
    __device__ void down(const Group<2>& x, Group<2>& next, int low, int t, float* to) {
        float sums[2][3] = {};  // C h, gh B, e A over the thread's states
        Sums rows[2];
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
                if constexpr (!kProducts) rows[i].v[k] = gh[k] * s.y;
                if constexpr (!kProducts) rows[i].v[K + k] = g * h[i][k];
            }
            if constexpr (kProducts) rows[i].multiply(gh, h[i], s.y, g, part < S / 2);
#pragma unroll
            for (int k = 0; k < K; ++k) gh[k] *= x.decay[i][k];
            if (t > 0) decays(next, i);
        }
        if constexpr (!kProducts) rows[0].sum(lane), rows[1].sum(lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) rows[i].store(to + (t + i) * (Memory::kSets * 2 * K * S), lane);
        store_sums(sums, x.step[0].x, x.step[1].x, low + t);
    }
    // Sums over the channel's parts; the lower half of them ends with token t's, the upper with the next
    // one's. They take the place of what all parts have read of the pair by then: the sums that the shuffles
    // bring depend on it. (racecheck warns here, since it does not count shuffles as barriers.)
    __device__ void store_sums(const float (&sums)[2][3], float dt, float next_dt, int t) {
        const bool upper = part >= S / 2;
        float v[3];
#pragma unroll
        for (int j = 0; j < 3; ++j)
            v[j] = (upper ? sums[1][j] : sums[0][j]) +
                   __shfl_xor_sync(kAllLanes, upper ? sums[0][j] : sums[1][j], S / 2 * kPartApart);
#pragma unroll
        for (int offset = S / 4; offset > 0; offset /= 2) {
#pragma unroll
            for (int j = 0; j < 3; ++j) v[j] += __shfl_xor_sync(kAllLanes, v[j], offset * kPartApart);
        }
        if (part % (S / 2) != 0) return;
        store_pack(m.pair[t + upper][slot].at, Pack<float, 4>{{upper ? next_dt : dt, v[0], v[1], v[2]}});
    }
    // Tokens from kFlush * `flush` on, downward.
    __device__ void down(int flush) {
        constexpr int N = 2;
        const int low = flush * Memory::kFlush;
        Group<N> now, next;
        float* const to = m.rows[0][warp * (Memory::kSets * kWarp / kThreads)] + Sums::offset(lane);
        load<true>(now, low + Memory::kFlush - N);
#pragma unroll
        for (int i = 0; i < N; ++i) decays(now, i);
#pragma unroll 8
        for (int t = Memory::kFlush - N; t >= 0; t -= N) {
            if (t > 0) load<true>(next, low + t - N);
            down(now, next, low, t, to);
            now = next;
        }
    }
};

}  // namespace ssm::cuda
