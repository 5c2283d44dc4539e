// CUDA kernels before a split in time of the selective scan: how far the inputs of a segment reach.
//
// A block has 8 channels of a segment and takes as many tiles at a time as it has warps, from the end asked
// for on: warp w the w-th of them. Of a tile a warp first makes the sums of dt between its tokens and the end
// of the tile, per channel. The sum of the whole tile is all that the other warps need: with those of the
// tiles between it and the end each adds up exp(A sum) w row by itself, into sums of its own, and the block
// adds those at the end. States of different channels, and of one channel, decay at very different speeds:
// a warp keeps a list of those that its tile still reaches, and gives each of its lanes one of them. The
// block stops when the slowest has decayed.
#include "ssm/ops/selective_scan/selective_scan_tile.cuh"

namespace ssm::cuda {
namespace {

using Own = Block<4, 4, kWarp>;  // a tile's pairs over a warp; threadIdx.x is the lane, threadIdx.y the warp
constexpr int kOwn = Own::kChannels;

template <class T, int N>
struct ReachIncoming {
    PairTile<T, 4, 4, kWarp> w, gate, delta;
    RowTile<4, N / 4, kWarp> rows;

    __device__ void load(const ReachParams<T>& p, int64_t t0, int count, const Channels<4, 4, kWarp>& c) {
        delta.load(p.delta, t0, count, c);
        w.load(p.w, t0, count, c);
        gate.load(p.gate, t0, count, c);
        rows.load(p.rows, t0, count, p.packed);
    }
};

// Of a warp. A pair is one of the channels with one of its N states.
template <class T, int N>
struct alignas(16) ReachShared {
    static constexpr int kPairs = kOwn * N;
    float2 step[kOwn]
               [kTile + 2];  // dt, w; then sum of dt to the tile's end, w (padded: one bank each channel)
    float rows[kTile][N];
    float after[kOwn];      // sum of dt between the tile and the end asked for
    float sums[kPairs];     // of exp(A sum) w row
    uint16_t near[kPairs];  // pairs which the tile reaches

    // Tokens past `count`, and channels past d, add nothing.
    template <bool kReverse>
    __device__ void stage(const ReachIncoming<T, N>& x, const ReachParams<T>& p, int count, int inside,
                          float2 bias) {
        float2 dt[Own::kTwos];
        steps_of(dt, x.delta, bias, p.softplus, count);
#pragma unroll
        for (int i = 0; i < Own::kTwos; ++i) {
            float2 w = x.w.floats(i);
            if (!kReverse) w = {w.x * dt[i].x, w.y * dt[i].y};
            if (kReverse && p.gate.data != nullptr) {
                const float2 gate = silu_fast(x.gate.floats(i));
                w = {w.x * gate.x, w.y * gate.y};
            }
            const int t = Own::token(i), c = Own::channel();
            step[c][t] = {dt[i].x, t < count && inside > 0 ? w.x : 0.0f};
            step[c + 1][t] = {dt[i].y, t < count && inside > 1 ? w.y : 0.0f};
        }
        x.rows.store(&rows[0][0], p.A.shape[1]);
        __syncwarp();
    }
    // Four lanes a channel. Returns the sum of the lane's channel, where leads().
    template <bool kReverse>
    __device__ float sum_steps() {
        constexpr int kQuarter = kTile / 4;
        const int quarter = static_cast<int>(threadIdx.x) % 4;
        float2* const from = &step[threadIdx.x / 4][quarter * kQuarter];
        float dt[kQuarter], w[kQuarter];
#pragma unroll
        for (int i = 0; i < kQuarter; i += 2) {
            const Pack<float, 4> two = load_pack<4>(&from[i].x);
            dt[i] = two.at[0], w[i] = two.at[1], dt[i + 1] = two.at[2], w[i + 1] = two.at[3];
        }
        float sum = 0.0f;  // of later tokens; in reverse of earlier ones and of the token itself
#pragma unroll
        for (int i = 0; i < kQuarter; ++i) {
            const int t = kReverse ? i : kQuarter - 1 - i;
            const float before = sum;
            sum += dt[t];
            dt[t] = kReverse ? sum : before;
        }
        float upto = sum;
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            const float other = kReverse ? __shfl_up_sync(kAllLanes, upto, offset, 4)
                                         : __shfl_down_sync(kAllLanes, upto, offset, 4);
            if (kReverse ? quarter >= offset : quarter + offset < 4) upto += other;
        }
        float others =
            kReverse ? __shfl_up_sync(kAllLanes, upto, 1, 4) : __shfl_down_sync(kAllLanes, upto, 1, 4);
        if (leads<!kReverse>()) others = 0.0f;
#pragma unroll
        for (int i = 0; i < kQuarter; i += 2)
            store_pack(&from[i].x, Pack<float, 4>{{dt[i] + others, w[i], dt[i + 1] + others, w[i + 1]}});
        return upto;
    }
    template <bool kReverse>
    __device__ static bool leads() {
        return threadIdx.x % 4 == (kReverse ? 3 : 0);
    }
    // Drops pairs that have decayed before the tile; returns how many of `count` are left, in their order.
    __device__ int drop(const float* A, int count, bool decays) {
        const int lane = static_cast<int>(threadIdx.x);
        int left = 0;
        for (int i = 0; i < count; i += kWarp) {
            const int pair = near[min(i + lane, count - 1)];
            __syncwarp();
            const bool keep = i + lane < count && !(decays && A[pair] * after[pair / N] < kNothing<T>);
            const unsigned kept = __ballot_sync(kAllLanes, keep);
            if (keep) near[left + __popc(kept & ((1u << lane) - 1))] = static_cast<uint16_t>(pair);
            left += __popc(kept);
        }
        __syncwarp();
        return left;
    }
    __device__ void add(const float* A, int count) {
        const int lane = static_cast<int>(threadIdx.x);
        for (int i = 0; i < count; i += kWarp) {
            const int pair = near[min(i + lane, count - 1)], c = pair / N, j = pair % N;
            const float a = A[pair], decay = a * after[c];
            float sum = 0.0f;
#pragma unroll
            for (int t = 0; t < kTile; t += 2) {
                const Pack<float, 4> two = load_pack<4>(&step[c][t].x);
                sum = fmaf(exp2_fast(fmaf(two.at[0], a, decay)), two.at[1] * rows[t][j], sum);
                sum = fmaf(exp2_fast(fmaf(two.at[2], a, decay)), two.at[3] * rows[t + 1][j], sum);
            }
            if (i + lane < count) sums[pair] += sum;
        }
        __syncwarp();  // the next tile takes this one's place
    }
};

template <class T, int N, int kWarps>
struct ReachBlock {
    ReachShared<T, N> warp[kWarps];
    float A[kOwn * N];
    float totals[2][kWarps][kOwn];  // sums of dt over the tiles of this round and of the one before
};

// A of the block's pairs in shared memory, zero sums, all pairs that exist in the lists; their number.
template <class T, int N, int kWarps>
__device__ inline int begin_reach(ReachBlock<T, N, kWarps>& m, const ReachParams<T>& p, int64_t d0) {
    const int64_t d = p.A.shape[0], n = p.A.shape[1];
    const int lane = static_cast<int>(threadIdx.x), channels = static_cast<int>(min(d - d0, int64_t{kOwn}));
    auto& mine = m.warp[threadIdx.y];
    int count = 0;
    for (int pair = lane; pair < kOwn * N; pair += kWarp) {
        const int c = pair / N, j = pair % N;
        const bool exists = c < channels && j < n;
        if (threadIdx.y == 0) m.A[pair] = exists ? p.A.data[(d0 + c) * p.A.stride + j] * kLog2E : -INFINITY;
        mine.sums[pair] = 0.0f;
        const unsigned some = __ballot_sync(kAllLanes, exists);
        if (exists) mine.near[count + __popc(some & ((1u << lane) - 1))] = static_cast<uint16_t>(pair);
        count += __popc(some);
    }
    __syncthreads();
    return count;
}

template <class T, int N, int kWarps, bool kReverse>
__global__ void __launch_bounds__(kWarps* kWarp, N == 16 ? (sizeof(T) == 2 ? 24 : 16) / kWarps : 4)
    Reach(const __grid_constant__ ReachParams<T> p) {
    __shared__ alignas(16) ReachBlock<T, N, kWarps> m;
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    if (kReverse ? span.first : span.last) return;  // nobody asks for it
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kOwn;
    const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
    auto& mine = m.warp[warp];
    const float2 bias = two_channels(p.bias, d0 + Own::channel(), d);
    const Channels<4, 4, kWarp> channels(d0, d, p.paired);
    const int inside = static_cast<int>(min(d - d0 - Own::channel(), int64_t{2}));
    const int64_t tiles = (span.end - span.begin + kTile - 1) / kTile;
    const auto begin = [&](int64_t i) { return span.begin + (kReverse ? i : tiles - 1 - i) * kTile; };
    const auto tokens = [&](int64_t i) {
        return i < tiles ? static_cast<int>(min(span.end - begin(i), int64_t{kTile})) : 0;
    };
    ReachIncoming<T, N> x;
    if (warp < tiles) x.load(p, begin(warp), tokens(warp), channels);
    int count = begin_reach(m, p, d0);
    float slowest = -INFINITY, sum = 0.0f;  // of channel lane % kOwn: of A; of dt, over the rounds so far
    for (int j = lane / kOwn; j < N; j += kWarp / kOwn) slowest = fmaxf(slowest, m.A[lane % kOwn * N + j]);
    slowest = fmaxf(slowest, __shfl_xor_sync(kAllLanes, slowest, kOwn));
    slowest = fmaxf(slowest, __shfl_xor_sync(kAllLanes, slowest, 2 * kOwn));
    for (int64_t round = 0; round * kWarps < tiles; ++round) {
        const int64_t i = round * kWarps + warp;
        const int many = tokens(i);
        float total = 0.0f;
        if (many > 0) {
            mine.template stage<kReverse>(x, p, many, inside, bias);
            total = mine.template sum_steps<kReverse>();
            if (i + kWarps < tiles) x.load(p, begin(i + kWarps), tokens(i + kWarps), channels);
        }
        float(&totals)[kWarps][kOwn] = m.totals[round % 2];  // others may still read the last round's
        if (mine.template leads<kReverse>()) totals[warp][lane / 4] = total;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp && lane < kOwn) mine.after[lane] = sum;
            sum += totals[w][lane % kOwn];
        }
        __syncwarp();
        if (many > 0) {
            count = mine.drop(m.A, count, p.softplus);
            mine.add(m.A, count);
        }
        const bool done = p.softplus && (slowest == -INFINITY || slowest * sum < kNothing<T>);
        if (__all_sync(kAllLanes, done)) break;  // in all warps: they have the same sums
    }
    __syncthreads();
    for (int pair = warp * kWarp + lane; pair < kOwn * N; pair += kWarps * kWarp) {
        const int64_t c = d0 + pair / N, j = pair % N;
        float end = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) end += m.warp[w].sums[pair];
        if (c < d && j < n) p.ends[(span.index * d + c) * n + j] = end;
    }
    if (warp == 0 && lane < kOwn && d0 + lane < d) p.sums[span.index * d + d0 + lane] = sum;
}

template <class T, int N, int kWarps>
void launch(const Exec& ex, ReachParams<T> p, bool reverse) {
    p.d_blocks = (p.A.shape[0] + kOwn - 1) / kOwn;
    const auto blocks = static_cast<unsigned>(p.segments.count * p.d_blocks);
    auto* const kernel = reverse ? Reach<T, N, kWarps, true> : Reach<T, N, kWarps, false>;
    kernel<<<blocks, dim3(kWarp, kWarps), 0, stream_of(ex)>>>(p);
    check_launch("selective_scan");
}

}  // namespace

template <class T>
void selective_scan_reach(const Exec& ex, const ReachParams<T>& p, bool reverse) {
    if (p.A.shape[1] <= 16) {
        launch<T, 16, 4>(ex, p, reverse);
    } else {
        launch<T, 64, 2>(ex, p, reverse);
    }
}

template void selective_scan_reach(const Exec&, const ReachParams<float>&, bool);
template void selective_scan_reach(const Exec&, const ReachParams<bf16>&, bool);

}  // namespace ssm::cuda
