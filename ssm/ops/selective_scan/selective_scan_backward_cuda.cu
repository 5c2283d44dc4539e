// CUDA kernels of the selective scan's gradient: the pass before a split in time, the pass itself, the sums
// over what blocks leave in pieces.
#include <type_traits>

#include "ssm/ops/selective_scan/selective_scan_backward_cuda.cuh"

namespace ssm::cuda {
namespace {

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
    BackwardIncoming<T, K, S> x;
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
template <int K, int S, class T>
__device__ inline void give_pairs(const View<T, 2>& to, int64_t t0, int count, int64_t d0,
                                  const float (&value)[Block<K, S>::kPairs], bool set) {
    constexpr int kChannels = Block<K, S>::kChannels;
    if (to.data == nullptr) return;
    const int first = static_cast<int>(threadIdx.x) / kChannels;
    T* at = to.data + (t0 + first) * to.stride + d0 + static_cast<int>(threadIdx.x) % kChannels;
    const int64_t apart = S * to.stride;
    if (set) {
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i, at += apart)
            if (first + i * S < count) *at = from_float<T>(value[i]);
    } else {
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i, at += apart)
            if (first + i * S < count) *at = from_float<T>(to_float(*at) + value[i]);
    }
}

template <class T, int K, int S>
__device__ inline void finish_pairs(const BackwardParams<T>& p, const BackwardShared<K, S>& m, int64_t t0,
                                    int count, int64_t d0, float bias, float D, ChannelGradients& sums) {
    constexpr int kChannels = Block<K, S>::kChannels, kPairs = Block<K, S>::kPairs;
    const int channel = static_cast<int>(threadIdx.x) % kChannels,
              first = static_cast<int>(threadIdx.x) / kChannels;
    if (d0 + channel >= p.u.shape[1]) return;
    float gu[kPairs], gdelta[kPairs], gz[kPairs];
    PairTile<T, K, S> us, zs, grads;
    PairTile<float, K, S> deltas;  // read again: kept, they would cost a block its registers
    us.load(p.u, t0, count, d0), zs.load(p.z, t0, count, d0);
    deltas.load(p.delta, t0, count, d0), grads.load(p.grad_y, t0, count, d0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int t = first + i * S;
        const float u = to_float(us.at[i]), y = fmaf(D, u, m.gradient[t][channel]);
        const float2 s = m.sums[t][channel];
        float g = to_float(grads.at[i]);
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
__device__ inline void finish_rows(const BackwardParams<T>& p, const BackwardShared<K, S>& m, int64_t t0,
                                   int count) {
    constexpr int kStates = K * S;
    const int n = static_cast<int>(p.A.shape[1]);
    float* to = p.rows + (blockIdx.x % p.d_blocks * p.u.shape[0] + t0) * 2 * n;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kTile * 2 * kStates; i += kThreads) {
        const int t = i / (2 * kStates), j = i % (2 * kStates);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < BackwardShared<K, S>::kWarps; ++w) sum += m.rows[t][w][j];
        if (t < count && j % kStates < n) to[t * 2 * n + j / kStates * n + j % kStates] = sum;
    }
}

// Sums over the block's tokens, to [2 d]: D, then delta_bias. Threads of one channel lie kChannels apart.
template <int kChannels>
__device__ inline void give_channels(float2* both, const ChannelGradients& sums, float* to, int64_t d0,
                                     int64_t d) {
    const int thread = static_cast<int>(threadIdx.x);
    both[thread] = {sums.D, sums.bias};
    __syncthreads();
    if (thread >= kChannels || d0 + thread >= d) return;
    float2 sum{};
    for (int i = thread; i < kThreads; i += kChannels) sum.x += both[i].x, sum.y += both[i].y;
    to[d0 + thread] = sum.x;
    to[d + d0 + thread] = sum.y;
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, S == 4 ? 3 : 2)
    Backward(const __grid_constant__ BackwardParams<T> p) {
    constexpr int kChannels = Block<K, S>::kChannels;
    extern __shared__ float4 memory[];
    auto& m = *reinterpret_cast<BackwardShared<K, S>*>(memory);
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kChannels;
    const int pair_channel = thread % kChannels, pair_first = thread / kChannels;
    const bool mine = d0 + pair_channel < d;
    const float bias = p.bias != nullptr && mine ? p.bias[d0 + pair_channel] : 0.0f,
                D = p.D != nullptr && mine ? p.D[d0 + pair_channel] : 0.0f;
    BackwardWalk<T, K, S> walk{m, p, thread / S, thread % S, thread % kWarp, thread / kWarp, {}, {}, {}};
    const int64_t c = d0 + walk.channel;
    const int part = walk.part;
    load_states(walk.A, p.A.data + c * (p.A.stride - n), c, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) walk.A[k] *= kLog2E;
    const int64_t row = p.segments.split ? span.index : span.sequence;
    load_states(walk.gh, p.entering != nullptr ? p.entering + row * d * n : nullptr, c, d, n, part);
    ChannelGradients sums;
    const int64_t first_tile = p.first_tile.first.offset(span.sequence);
    BackwardIncoming<T, K, S> x;
    const auto load = [&](BackwardIncoming<T, K, S>& to, int64_t t0) {
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
    if (p.channels != nullptr)
        give_channels<kChannels>(reinterpret_cast<float2*>(memory), sums, p.channels + 2 * span.index * d, d0,
                                 d);
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
BackwardParams<T> make_params(const SelectiveScanInputs<T>& in, View<const T, 2> grad_y,
                              const SelectiveScanGradients<T>& grad) {
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
                  const SelectiveScanGradients<T>& grad, const SelectiveScanOptions& options) {
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
    constexpr int kBytes = static_cast<int>(sizeof(BackwardShared<K, S>));
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
    with_block(n, [&](auto k, auto parts) {
        run_backward<T, decltype(k)::value, decltype(parts)::value>(ex, p, in.cu_seqlens, grad_final_state,
                                                                    grad, options);
    });
}

template void selective_scan_backward(const Exec&, const SelectiveScanInputs<float>&, View<const float, 3>,
                                      View<const float, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<float>&, const SelectiveScanOptions&);
template void selective_scan_backward(const Exec&, const SelectiveScanInputs<bf16>&, View<const float, 3>,
                                      View<const bf16, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<bf16>&, const SelectiveScanOptions&);

}  // namespace ssm::cuda
