// CUDA kernels of the selective scan's gradient: the pass itself, and the sums over what blocks leave in
// pieces.
#include "ssm/ops/selective_scan/selective_scan_backward_cuda.cuh"

namespace ssm::cuda {
namespace {

// What tiles leave to the thread of two channels: their sums over time.
struct ChannelGradients {
    float2 D{}, bias{};
};

__device__ inline void give(const View<float, 2>& to, int64_t t, int64_t c, float value, bool set) {
    if (to.data == nullptr) return;
    float* at = to.data + t * to.stride + c;
    *at = set ? value : *at + value;
}

// The thread's pairs of a tile, to a matrix of gradients.
template <class T, int K, int S>
__device__ inline void give_pairs(const View<T, 2>& to, int64_t t0, int count, const Channels<K, S>& c,
                                  const float2 (&value)[Block<K, S>::kTwos], bool set) {
    using Shape = Block<K, S>;
    if (to.data == nullptr) return;
    T* const row = to.data + t0 * to.stride + c.d0;
    const int stride = static_cast<int>(to.stride);
    if (c.whole || (c.paired && set && count >= kTile)) {
        T* at = row + c.offset(stride);
        const int64_t apart = Shape::kApart * to.stride;
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i, at += apart)
            *reinterpret_cast<Two<T>*>(at) = two_of<T>(value[i]);
        return;
    }
    const bool both = c.d0 + Shape::channel() + 1 < to.shape[1];
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i) {
        if (Shape::token(i) >= count) continue;
        T* const at = row + (Shape::token(i) * stride + Shape::channel());
        at[0] = from_float<T>(set ? value[i].x : to_float(at[0]) + value[i].x);
        if (both) at[1] = from_float<T>(set ? value[i].y : to_float(at[1]) + value[i].y);
    }
}

// One pair, from what the walk down left.
struct PairGradients {
    float u, delta, z, D, y;
};
__device__ inline PairGradients pair_gradients(float u, float z, float grad_y, float D,
                                               const Pack<float, 4>& left, bool gated) {
    PairGradients r{};
    const float dt = left.at[0], Ch = left.at[1];
    float g = grad_y;
    r.y = fmaf(D, u, Ch);
    if (gated) {
        const float slope = sigmoid_fast(z);
        r.z = g * r.y * silu_slope(z, slope);
        g *= z * slope;
        r.y *= z * slope;
    }
    r.u = fmaf(D, g, dt * left.at[2]);
    r.delta = fmaf(u, left.at[2], left.at[3] * kLn2);
    r.D = g * u;
    return r;
}
// softplus' where softplus is dt: 1 - exp(-dt), by its series where the difference would cancel.
__device__ inline float softplus_slope(float dt) {
    const float series = dt * fmaf(dt, fmaf(dt, fmaf(dt, -1.0f / 24, 1.0f / 6), -0.5f), 1.0f);
    return dt < 0.1f ? series : 1.0f - exp2_fast(-kLog2E * dt);
}

template <class T, int K, int S>
__device__ inline void finish_pairs(const BackwardParams<T>& p, const BackwardShared<T, K, S>& m, int64_t t0,
                                    int count, const Channels<K, S>& c, float2 D, ChannelGradients& sums) {
    using Shape = Block<K, S>;
    using Memory = BackwardShared<T, K, S>;
    const int channel = Shape::channel();
    if (!c.whole && c.d0 + channel >= p.u.shape[1]) return;
    float2 gu[Shape::kTwos], gdelta[Shape::kTwos], gz[Shape::kTwos], y[Shape::kTwos];
    PairTile<T, K, S> us, zs, grads;  // in registers they would cost a multiprocessor a block
    if constexpr (Memory::kKeeps) {
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) {
            us.at[i] = m.kept[0][Shape::token(i)][channel / 2];
            zs.at[i] = m.kept[1][Shape::token(i)][channel / 2];
            grads.at[i] = m.kept[2][Shape::token(i)][channel / 2];
        }
    } else {
        us.load(p.u, t0, count, c), zs.load(p.z, t0, count, c), grads.load(p.grad_y, t0, count, c);
    }
    const bool gated = c.whole || p.z.data != nullptr, softplus = c.whole || p.softplus;
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i) {
        const int t = Shape::token(i);
        const float2 u = us.floats(i), z = zs.floats(i), g = grads.floats(i);
        const Pack<float, 4> even = m.pair[t][Memory::slot(channel)],
                             odd = m.pair[t][Memory::slot(channel + 1)];
        PairGradients a = pair_gradients(u.x, z.x, g.x, D.x, even, gated),
                      b = pair_gradients(u.y, z.y, g.y, D.y, odd, gated);
        if (softplus) a.delta *= softplus_slope(even.at[0]), b.delta *= softplus_slope(odd.at[0]);
        gu[i] = {a.u, b.u}, gdelta[i] = {a.delta, b.delta}, gz[i] = {a.z, b.z};
        y[i] = {a.y, b.y};
        if (t < count) {
            sums.D.x += a.D, sums.D.y += b.D;
            sums.bias.x += a.delta, sums.bias.y += b.delta;
        }
    }
    give_pairs(p.grad_u, t0, count, c, gu, p.set.u);
    give_pairs(p.grad_delta, t0, count, c, gdelta, p.set.delta);
    give_pairs(p.grad_z, t0, count, c, gz, p.set.z);
    give_pairs(p.y, t0, count, c, y, true);  // over grad_y, where this thread has read it
}

// Sums of the rows that tokens kFlush * `flush` ... left, four at a time.
// `to`: [t 2 n] from the tile's first token on.
template <class T, int K, int S>
__device__ inline void finish_rows(T* to, int n, const BackwardShared<T, K, S>& m, int count, int flush) {
    using Memory = BackwardShared<T, K, S>;
    constexpr int kFours = 2 * K * S / 4, kApart = kThreads / kFours;
    const int thread = static_cast<int>(threadIdx.x);
    const int j = thread % kFours * 4, low = flush * Memory::kFlush, state = j % (K * S);
    to += j / (K * S) * n + state;
#pragma unroll
    for (int i = 0; i < Memory::kFlush / kApart; ++i) {
        const int t = thread / kFours + i * kApart;
        Pack<float, 4> sum = load_pack<4>(&m.rows[t][0][j]);
#pragma unroll
        for (int w = 1; w < Memory::kSets; ++w) {
            const Pack<float, 4> v = load_pack<4>(&m.rows[t][w][j]);
#pragma unroll
            for (int k = 0; k < 4; ++k) sum.at[k] += v.at[k];
        }
        if (low + t >= count) continue;
        if (n % 4 == 0) {
            if (state >= n) continue;
            Pack<T, 4> rounded;
#pragma unroll
            for (int k = 0; k < 4; ++k) rounded.at[k] = from_float<T>(sum.at[k]);
            store_pack(to + (low + t) * 2 * n, rounded);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (state + k < n) to[(low + t) * 2 * n + k] = from_float<T>(sum.at[k]);
        }
    }
}

// Sums over the block's tokens, to [2 d]: D, then delta_bias. Threads of one channel lie kLanes apart.
template <int kLanes>
__device__ inline void give_channels(float4* all, const ChannelGradients& sums, float* to, int64_t d0,
                                     int64_t d) {
    const int thread = static_cast<int>(threadIdx.x);
    all[thread] = {sums.D.x, sums.D.y, sums.bias.x, sums.bias.y};
    __syncthreads();
    if (thread >= kLanes) return;
    float4 sum{};
    for (int i = thread; i < kThreads; i += kLanes)
        sum.x += all[i].x, sum.y += all[i].y, sum.z += all[i].z, sum.w += all[i].w;
    const int64_t c = d0 + 2 * thread;
    if (c < d) to[c] = sum.x, to[d + c] = sum.z;
    if (c + 1 < d) to[c + 1] = sum.y, to[d + c + 1] = sum.w;
}

// A tile's pairs, from registers to shared memory.
template <class T, int K, int S>
__device__ inline void stage(BackwardShared<T, K, S>& m, const BackwardParams<T>& p,
                             const BackwardIncoming<T, K, S>& x, const Channels<K, S>& c, int n, float2 bias,
                             int count) {
    using Shape = Block<K, S>;
    using Memory = BackwardShared<T, K, S>;
    const int channel = Shape::channel(),
              inside = c.whole ? 2 : static_cast<int>(min(p.u.shape[1] - c.d0 - channel, int64_t{2}));
    float2 dt[Shape::kTwos], g[Shape::kTwos];
    steps_of(dt, x.delta, bias, c.whole || p.softplus, count);
    x.gradients(g, c.whole || p.z.data != nullptr, inside, count);
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i) {
        const int t = Shape::token(i);
        const float2 u = x.u.floats(i);
        store_pack(m.pair[t][Memory::slot(channel)].at,
                   Pack<float, 4>{{dt[i].x, dt[i].x * u.x, g[i].x, 0.0f}});
        store_pack(m.pair[t][Memory::slot(channel + 1)].at,
                   Pack<float, 4>{{dt[i].y, dt[i].y * u.y, g[i].y, 0.0f}});
        if constexpr (Memory::kKeeps) {
            m.kept[0][t][channel / 2] = x.u.at[i];
            m.kept[1][t][channel / 2] = x.z.at[i];
            m.kept[2][t][channel / 2] = x.grad_y.at[i];
        }
    }
    x.B.store(&m.B[0][0], n);
    x.C.store(&m.C[0][0], n);
}

// kWhole: every tile has kTile tokens and every block all channels, n is K S, nothing optional is absent and
// nothing is added to, and rows are aligned (is_whole). Then no pair is looked at before it is moved.
// kSplit: time may be split. Without a split `enter` would be 1.7 % of the time.
template <class T, int K, int S, bool kWhole, bool kSplit>
__global__ void __launch_bounds__(kThreads, S == 4 ? 3 : 2)
    Backward(const __grid_constant__ BackwardParams<T> p) {
    using Shape = Block<K, S>;
    using Memory = BackwardShared<T, K, S>;
    extern __shared__ float4 memory[];
    auto& m = *reinterpret_cast<Memory*>(memory);
    const auto d_blocks = static_cast<unsigned>(p.d_blocks), d_block = blockIdx.x % d_blocks;
    const auto span = p.segments.at(blockIdx.x / d_blocks);
    const int64_t d = p.A.shape[0], n = kWhole ? K * S : p.A.shape[1], d0 = d_block * Shape::kChannels;
    const float2 bias = two_channels(p.bias, d0 + Shape::channel(), d),
                 D = two_channels(p.D, d0 + Shape::channel(), d);
    BackwardWalk<T, K, S> walk(m);
    const int64_t c = d0 + walk.channel;
    const int part = walk.part;
    load_states(walk.A, p.A.data + c * (p.A.stride - n), c, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) walk.A[k] *= kLog2E;
    if constexpr (!kSplit) {
        const float* const start = p.entering.start;
        load_states(walk.gh, start != nullptr ? start + span.sequence * d * n : nullptr, c, d, n, part);
    }
    ChannelGradients sums;
    const Channels<K, S> channels(d0, d, kWhole || p.paired, kWhole);
    const auto tokens = [&](int64_t t0) {
        return kWhole || span.end - t0 >= kTile ? kTile : static_cast<int>(span.end - t0);
    };
    const int64_t last = span.begin + (span.end - span.begin - 1) / kTile * kTile;
    const int64_t tile = p.first_tile.first.offset(span.sequence) + (last - span.start) / kTile;
    const float* state = p.states + tile * d * n;
    T* rows = p.rows + (d_block * p.u.shape[0] + last) * 2 * n;
    BackwardIncoming<T, K, S> x;
    const auto load = [&](int64_t t0) {
        x.load(p, t0, tokens(t0), channels);
        if constexpr (kWhole) {
            load_row(x.state, state + c * n + part * K);
        } else {
            load_states(x.state, state, c, d, n, part, p.packed_states);
        }
        state -= d * n;
    };
    if (span.end > span.begin) load(last);
    if constexpr (kSplit) enter<T, true>(walk.gh, p.entering, p.segments, span, walk.A, c, d, n, part);
    for (int64_t t0 = last; t0 >= span.begin && span.end > span.begin; t0 -= kTile, rows -= kTile * 2 * n) {
        const int count = tokens(t0);
        stage(m, p, x, channels, static_cast<int>(n), bias, count);
        __syncthreads();
        walk.up(x.state);
        if (t0 > span.begin) load(t0 - kTile);
#pragma unroll 1
        for (int flush = kTile / Memory::kFlush - 1; flush >= 0; --flush) {
            walk.down(flush);
            __syncthreads();
            if (flush == 0) finish_pairs(p, m, t0, count, channels, D, sums);
            if (kWhole || p.rows != nullptr) finish_rows(rows, static_cast<int>(n), m, count, flush);
            __syncthreads();
        }
    }
    if (p.grad_initial != nullptr && span.first && c < d) {
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (part * K + k < n) p.grad_initial[(span.sequence * d + c) * n + part * K + k] += walk.gh[k];
    }
    if (p.states_A != nullptr) store_states(p.states_A + span.index * d * n, walk.gA, c, d, n, part);
    if (p.channels != nullptr)
        give_channels<Shape::kLanes>(memory, sums, p.channels + 2 * span.index * d, d0, d);
}

// to[r][j] <- (set ? 0 : to[r][j]) + sum over i < count of from[i][r][j], in the order of i.
template <class T>
struct SumParams {
    const T* from;
    int64_t count, apart, from_stride;  // elements between two i and between two r
    View<float, 2> to;
    bool set;
};
template <class T>
__global__ void __launch_bounds__(kThreads) Sum(const __grid_constant__ SumParams<T> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n = p.to.shape[1];
    if (i >= p.to.shape[0] * n) return;
    const int64_t r = i / n, j = i % n;
    const T* from = p.from + r * p.from_stride + j;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t k = 0; k < p.count; ++k) sum += to_float(from[k * p.apart]);
    give(p.to, r, j, sum, p.set);
}

// The same for what channels left of B and C, [count t 2 n] at `from`, four sums a thread; n % 4 == 0.
template <class T>
struct SumRowsParams {
    const T* from;
    int64_t count, tokens, n;
    View<float, 2> B, C;
    bool set_B, set_C;
};
template <class T>
__global__ void __launch_bounds__(kThreads) SumRows(const __grid_constant__ SumRowsParams<T> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = p.n / 2;
    if (i >= p.tokens * row) return;
    const int64_t t = i / row, j = i % row * 4;
    Pack<float, 4> sum = {};
#pragma unroll 8
    for (int64_t k = 0; k < p.count; ++k) {
        const Pack<T, 4> v = load_pack<4>(p.from + (k * p.tokens * row + i) * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.at[e] += to_float(v.at[e]);
    }
    const bool of_C = j >= p.n;
#pragma unroll
    for (int e = 0; e < 4; ++e)
        give(of_C ? p.C : p.B, t, (of_C ? j - p.n : j) + e, sum.at[e], of_C ? p.set_C : p.set_B);
}

template <class T>
void sum(const Exec& ex, const SumParams<T>& p) {
    if (p.to.data == nullptr || p.to.size() == 0) return;
    Sum<T><<<blocks_for(p.to.size(), kThreads), kThreads, 0, stream_of(ex)>>>(p);
    check_launch("selective_scan_backward");
}

template <class T>
BackwardParams<T> make_params(const SelectiveScanInputs<T>& in, View<const T, 2> grad_y,
                              const SelectiveScanGradients<T>& grad) {
    BackwardParams<T> p{};
    require_stride(in.u), require_stride(in.z), require_stride(in.delta), require_stride(grad_y);
    require_stride(in.B), require_stride(in.C);
    require_stride(grad.u), require_stride(grad.delta), require_stride(grad.z), require_stride(grad.y);
    p.u = in.u, p.z = in.z, p.delta = in.delta, p.A = in.A, p.B = in.B, p.C = in.C, p.grad_y = grad_y;
    p.D = in.D.data, p.bias = in.delta_bias.data, p.softplus = in.delta_softplus;
    p.grad_u = grad.u, p.grad_delta = grad.delta, p.grad_z = grad.z, p.set = grad.set;
    p.grad_initial = grad.initial_state.data, p.y = grad.y;
    p.paired = paired(in.u) && paired(in.z) && paired(in.delta) && paired(grad_y) && paired(grad.u) &&
               paired(grad.delta) && paired(grad.z) && paired(grad.y);
    p.packed = packed_rows(in.B) && packed_rows(in.C);
    return p;
}

// See Backward.
template <class T, int K, int S>
bool is_whole(const BackwardParams<T>& p, CuSeqlens cu) {
    const SelectiveScanSet& set = p.set;
    return whole_tiles<K, S>(p.A, cu) && p.paired && p.packed && p.packed_states && p.z.data != nullptr &&
           p.softplus && p.grad_u.data != nullptr && p.grad_delta.data != nullptr &&
           p.grad_z.data != nullptr && set.u && set.delta && set.z && p.rows != nullptr;
}

template <class T, int K, int S>
void launch_backward(const Exec& ex, const BackwardParams<T>& p, bool whole, unsigned blocks) {
    constexpr int kBytes = static_cast<int>(sizeof(BackwardShared<T, K, S>));
    constexpr bool kWhole = K * S == 16;
    auto* const kernel = !whole             ? Backward<T, K, S, false, true>
                         : p.segments.split ? Backward<T, K, S, kWhole, true>
                                            : Backward<T, K, S, kWhole, !kWhole>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "selective_scan_backward");
    kernel<<<blocks, kThreads, kBytes, stream_of(ex)>>>(p);
    check_launch("selective_scan_backward");
}

template <class T, int K, int S>
void run_backward(const Exec& ex, const SelectiveScanInputs<T>& in, BackwardParams<T> p,
                  View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
                  const SelectiveScanOptions& options) {
    const CuSeqlens cu = in.cu_seqlens;
    const int64_t t = p.u.shape[0], d = p.A.shape[0], n = p.A.shape[1],
                  s = static_cast<int64_t>(cu.size()) - 1;
    p.d_blocks = (d + Block<K, S>::kChannels - 1) / Block<K, S>::kChannels;
    const SegmentsOnDevice segments(ex, cu, p.d_blocks, selective_scan_want(ex, options, p.d_blocks * s, 3));
    p.segments = segments.get();
    const auto count = static_cast<size_t>(segments.count()), dn = static_cast<size_t>(d * n);
    const size_t split = p.segments.split ? count : 0;
    const auto blocks = static_cast<unsigned>(segments.count() * p.d_blocks);
    const Scratch<float> ends(ex, split * dn), sums(ex, split * static_cast<size_t>(d)),
        states_A(ex, grad.A ? count * dn : 0),
        channels(ex, grad.D || grad.delta_bias ? 2 * count * static_cast<size_t>(d) : 0);
    const Scratch<T> rows(ex, grad.B || grad.C ? static_cast<size_t>(p.d_blocks * t * 2 * n) : 0);
    p.rows = grad.B || grad.C ? rows.data() : nullptr;
    p.states_A = grad.A ? states_A.data() : nullptr;
    p.channels = grad.D || grad.delta_bias ? channels.data() : nullptr;
    p.entering = {grad_final_state.data, ends.data(), sums.data(), p.softplus};
    if (split > 0) {
        selective_scan_reach<T>(ex,
                                {p.grad_y, in.z, in.delta, in.A, in.C, p.bias, p.softplus, p.paired, p.packed,
                                 p.segments, 0, ends.data(), sums.data()},
                                true);
    }
    launch_backward<T, K, S>(ex, p, is_whole<T, K, S>(p, cu), blocks);
    const int64_t segment_count = segments.count();
    if (n % 4 == 0 && (grad.B || grad.C) && t > 0) {
        SumRows<T><<<blocks_for(t * n / 2, kThreads), kThreads, 0, stream_of(ex)>>>(
            {rows.data(), p.d_blocks, t, n, grad.B, grad.C, grad.set.B, grad.set.C});
        check_launch("selective_scan_backward");
    } else {
        sum<T>(ex, {rows.data(), p.d_blocks, t * 2 * n, 2 * n, grad.B, grad.set.B});
        sum<T>(ex, {rows.data() + n, p.d_blocks, t * 2 * n, 2 * n, grad.C, grad.set.C});
    }
    sum<float>(ex, {states_A.data(), segment_count, d * n, n, grad.A, false});
    sum<float>(ex, {channels.data(), segment_count, 2 * d, 0, {grad.D.data, {1, d}, d}, false});
    sum<float>(ex, {channels.data() + d, segment_count, 2 * d, 0, {grad.delta_bias.data, {1, d}, d}, false});
}

}  // namespace

template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const T, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
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
    p.packed_states = packed_states(p.states, n);
    with_block(n, [&](auto k, auto parts) {
        run_backward<T, decltype(k)::value, decltype(parts)::value>(ex, in, p, grad_final_state, grad,
                                                                    options);
    });
}

template void selective_scan_backward(const Exec&, const SelectiveScanInputs<float>&, View<const float, 3>,
                                      View<const float, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<float>&, const SelectiveScanOptions&);
template void selective_scan_backward(const Exec&, const SelectiveScanInputs<bf16>&, View<const float, 3>,
                                      View<const bf16, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<bf16>&, const SelectiveScanOptions&);

}  // namespace ssm::cuda
