// CUDA kernels before a split in time of the selective scan: how far the inputs of a segment reach.
#include "ssm/ops/selective_scan/selective_scan_tile.cuh"

namespace ssm::cuda {
namespace {

// Exponent of two from which on a decay is taken for zero. What came before is then left out: at most 2^-24
// of the state that it had made, which is what f32 rounds away from a state of that size at every token.
constexpr float kNothing = -24.0f;
constexpr int kWidth = kWarp;  // a warp is a block: each stops where its own few channels have decayed

template <class T, int K, int S>
struct ReachIncoming {
    PairTile<T, K, S, kWidth> w, gate, delta;
    RowTile<K, S, kWidth> rows;

    __device__ void load(const ReachParams<T>& p, int64_t t0, int64_t end, const Channels<K, S, kWidth>& c) {
        const int count = static_cast<int>(end - t0 < kTile ? end - t0 : kTile);
        delta.load(p.delta, t0, count, c);
        w.load(p.w, t0, count, c);
        gate.load(p.gate, t0, count, c);
        rows.load(p.rows, t0, count, p.packed);
    }
};

template <class T, int K, int S>
struct ReachShared {
    float2 step[kTile][Block<K, S, kWidth>::kChannels];  // dt, w
    float rows[kTile][K * S];

    template <bool kReverse>
    __device__ void stage(const ReachIncoming<T, K, S>& x, const ReachParams<T>& p, int count, int64_t d0,
                          float2 bias) {
        using Shape = Block<K, S, kWidth>;
        const int64_t d = p.A.shape[0], n = p.A.shape[1], c = d0 + Shape::channel();
        float2 dt[Shape::kTwos];
        steps_of(dt, x.delta, bias, p.softplus, count);
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) {
            float2 w = x.w.floats(i);
            if (!kReverse) w = {w.x * dt[i].x, w.y * dt[i].y};
            if (kReverse && p.gate.data != nullptr) {
                const float2 gate = silu_fast(x.gate.floats(i));
                w = {w.x * gate.x, w.y * gate.y};
            }
            const bool inside = Shape::token(i) < count;
            w = {inside && c < d ? w.x : 0.0f, inside && c + 1 < d ? w.y : 0.0f};
            store_pack(&step[Shape::token(i)][Shape::channel()].x,
                       Pack<float, 4>{{dt[i].x, w.x, dt[i].y, w.y}});
        }
        x.rows.store(&rows[0][0], n);
    }
};

template <class T, int K, int S, bool kReverse>
__global__ void __launch_bounds__(kWidth) Reach(const __grid_constant__ ReachParams<T> p) {
    constexpr int kChannels = Block<K, S, kWidth>::kChannels;
    __shared__ alignas(16) ReachShared<T, K, S> m;
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    if (kReverse ? span.first : span.last) return;  // nobody asks for it
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kChannels;
    const int channel = static_cast<int>(threadIdx.x) / S, part = static_cast<int>(threadIdx.x) % S;
    const float2 bias = two_channels(p.bias, d0 + Block<K, S, kWidth>::channel(), d);
    float A[K], h[K] = {}, sum = 0.0f, slowest = -INFINITY;
    load_states(A, p.A.data + (d0 + channel) * (p.A.stride - n), d0 + channel, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        A[k] *= kLog2E;
        if (d0 + channel < d && part * K + k < n) slowest = fmaxf(slowest, A[k]);
    }
    const int64_t last = span.begin + (span.end - span.begin - 1) / kTile * kTile;
    const int64_t from = kReverse ? span.begin : last, step = kReverse ? kTile : -kTile;
    const auto inside = [&](int64_t t0) { return t0 >= span.begin && t0 <= last; };
    const Channels<K, S, kWidth> channels(d0, d, p.paired);
    ReachIncoming<T, K, S> x;
    x.load(p, from, span.end, channels);
    for (int64_t t0 = from; inside(t0); t0 += step) {
        m.template stage<kReverse>(x, p, static_cast<int>(span.end - t0 < kTile ? span.end - t0 : kTile), d0,
                                   bias);
        __syncwarp();
        if (inside(t0 + step)) x.load(p, t0 + step, span.end, channels);
#pragma unroll 8
        for (int i = 0; i < kTile; ++i) {
            const int t = kReverse ? i : kTile - 1 - i;
            const float2 s = m.step[t][channel];
            float row[K];
            load_row(row, &m.rows[t][part * K]);
            if (kReverse) sum += s.x;
#pragma unroll
            for (int k = 0; k < K; ++k) h[k] = fmaf(exp2_fast(sum * A[k]), s.y * row[k], h[k]);
            if (!kReverse) sum += s.x;
        }
        const bool done = p.softplus && (slowest == -INFINITY || slowest * sum < kNothing);
        if (__all_sync(kAllLanes, done)) break;
    }
    store_states(p.ends + span.index * d * n, h, d0 + channel, d, n, part);
    if (part == 0 && d0 + channel < d) p.sums[span.index * d + d0 + channel] = sum;
}

}  // namespace

template <class T>
void selective_scan_reach(const Exec& ex, const ReachParams<T>& params, bool reverse) {
    with_block(params.A.shape[1], [&](auto k, auto parts) {
        constexpr int K = decltype(k)::value, S = decltype(parts)::value;
        ReachParams<T> p = params;
        p.d_blocks = (p.A.shape[0] + Block<K, S, kWidth>::kChannels - 1) / Block<K, S, kWidth>::kChannels;
        const auto blocks = static_cast<unsigned>(p.segments.count * p.d_blocks);
        if (reverse) {
            Reach<T, K, S, true><<<blocks, kWidth, 0, stream_of(ex)>>>(p);
        } else {
            Reach<T, K, S, false><<<blocks, kWidth, 0, stream_of(ex)>>>(p);
        }
        check_launch("selective_scan");
    });
}

template void selective_scan_reach(const Exec&, const ReachParams<float>&, bool);
template void selective_scan_reach(const Exec&, const ReachParams<bf16>&, bool);

}  // namespace ssm::cuda
