// CUDA kernels of the causal convolution, forward and step. A thread owns a pack of channels and takes a run
// of tokens through a window in registers, so that a row is read once (and k-1 rows of the run before).
#include "ssm/core/cuda/launch.cuh"
#include "ssm/ops/causal_conv1d/causal_conv1d_cuda.cuh"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "causal_conv1d";

__device__ inline float activate(float v, bool on) { return on ? v * sigmoid(v) : v; }

template <class T>
struct ForwardParams {
    ConvInputs<T> in;
    View<T, 2> y;
    int64_t run;  // tokens of a thread
};

// The filter in transposed form: what the inputs so far give to this output and the next two.
template <int N>
struct Pending {
    float at[kTaps - 1][N];

    __device__ explicit Pending(const Filter<N>& filter) {
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j)
#pragma unroll
            for (int n = 0; n < N; ++n) at[j][n] = filter.bias[n];
    }
    // Takes the next input, returns its output.
    __device__ Pack<float, N> push(const Filter<N>& filter, const Pack<float, N>& x) {
        Pack<float, N> y;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            y.at[n] = fmaf(filter.weight[3][n], x.at[n], at[0][n]);
            at[0][n] = fmaf(filter.weight[2][n], x.at[n], at[1][n]);
            at[1][n] = fmaf(filter.weight[1][n], x.at[n], at[2][n]);
            at[2][n] = fmaf(filter.weight[0][n], x.at[n], filter.bias[n]);
        }
        return y;
    }
};
static_assert(kTaps == 4);

// `left` tokens of one sequence from `token` on. The next rows are read before these are worked on.
template <class T, int N>
__device__ inline void forward_run(const ForwardParams<T>& p, const Filter<N>& filter, const Segment& segment,
                                   int64_t token, int left, int64_t channel) {
    constexpr int kBlock = 4;
    const int64_t x_stride = p.in.x.stride, y_stride = p.y.stride;
    const T* x = p.in.x.data + token * x_stride + channel;
    T* y = p.y.data + token * y_stride + channel;
    Raw<T, N> next[kBlock], now[kBlock];
    const auto load = [&](int count) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j, x += x_stride)
            if (j < count) next[j] = load_raw<N>(x);
    };
    load(left);
    Pending<N> pending(filter);
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j)
        pending.push(filter, load_input<N>(p.in, segment, token - (kTaps - 1) + j, channel));
    for (; left > 0; left -= kBlock) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) now[j] = next[j];
        load(left - kBlock);
#pragma unroll
        for (int j = 0; j < kBlock; ++j, y += y_stride) {
            Pack<float, N> v = pending.push(filter, to_floats<T, N>(now[j]));
#pragma unroll
            for (int n = 0; n < N; ++n) v.at[n] = activate(v.at[n], p.in.silu);
            if (j < left) store_floats(y, v);
        }
    }
}

template <class T, int N>
__global__ void __launch_bounds__(kConvThreads, N == 8 ? 2 : 3)
    Forward(const __grid_constant__ ForwardParams<T> p) {
    __shared__ SharedFilter<N> shared;
    const int64_t base = static_cast<int64_t>(blockIdx.x) * kWarp * N, t = p.in.x.shape[0];
    const int64_t channel = base + threadIdx.x % kWarp * N;
    int64_t token = (static_cast<int64_t>(blockIdx.y) * kRuns + threadIdx.x / kWarp) * p.run;
    const int64_t last = token + p.run < t ? token + p.run : t;
    Filter<N> filter;
    filter.load(p.in, base, shared);
    if (channel >= p.in.d()) return;
    while (token < last) {
        const Segment segment = segment_of(p.in.sequences, token);
        const int64_t end = segment.end < last ? segment.end : last;
        forward_run<T, N>(p, filter, segment, token, static_cast<int>(end - token), channel);
        token = end;
    }
}

// Filters of more than kTaps: a thread per output.
template <class T>
__global__ void __launch_bounds__(kConvThreads) ForwardPlain(const __grid_constant__ ForwardParams<T> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t token = i / p.in.d(), channel = i % p.in.d(), k = p.in.k();
    if (token >= p.in.x.shape[0]) return;
    const Segment segment = segment_of(p.in.sequences, token);
    const float* weight = p.in.weight.data + channel * p.in.weight.stride;
    float sum = p.in.bias.data != nullptr ? p.in.bias.data[channel * p.in.bias.stride] : 0.0f;
    for (int64_t j = 0; j < k; ++j)
        sum = fmaf(weight[j], load_input<1>(p.in, segment, token - k + 1 + j, channel).at[0], sum);
    p.y.data[token * p.y.stride + channel] = from_float<T>(activate(sum, p.in.silu));
}

template <class T>
struct StateParams {
    ConvInputs<T> in;
    View<T, 3> state;                // final_state, or the step's
    View<T, 2> y;                    // the step's
    const int32_t* slots = nullptr;  // [s], or absent
};

// The last k-1 inputs, oldest first: where final_state is initial_state, none is read after it is written.
template <class T>
__global__ void __launch_bounds__(kConvThreads) FinalState(const __grid_constant__ StateParams<T> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t s = i / p.in.d(), channel = i % p.in.d(), k = p.in.k();
    if (s >= p.in.sequences.count) return;
    const Segment segment{s, p.in.sequences.offset(s), p.in.sequences.offset(s + 1)};
    T* out = p.state.data + s * p.state.stride + channel;
    for (int64_t j = 0; j < k - 1; ++j) {
        const float v = load_input<1>(p.in, segment, segment.end - k + 1 + j, channel).at[0];
        out[j * p.in.d()] = from_float<T>(v);
    }
}

// k = kTaps: all that a thread reads is asked for at once. blockIdx.y is the sequence, or S of them.
constexpr int kStepThreads = 128;

// Few sequences: a thread a channel.
template <class T>
__global__ void __launch_bounds__(kStepThreads) StepTaps(const __grid_constant__ StateParams<T> p) {
    allow_next();
    const int64_t d = p.in.d(), s = blockIdx.y;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
    if (channel >= d) return wait_for_inputs();
    T* state = p.state.data + (p.slots != nullptr ? p.slots[s] : s) * p.state.stride + channel;
    const Pack<float, kTaps> weight = load_pack<kTaps>(p.in.weight.data + channel * kTaps);
    float sum = p.in.bias.data != nullptr ? p.in.bias.data[channel] : 0.0f;
    wait_for_inputs();
    T rows[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
        rows[j] = j < kTaps - 1 ? state[j * d] : p.in.x.data[s * p.in.x.stride + channel];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) sum = fmaf(weight.at[j], to_float(rows[j]), sum);
#pragma unroll
    for (int j = 1; j < kTaps; ++j) state[(j - 1) * d] = rows[j];
    p.y.data[s * p.y.stride + channel] = from_float<T>(activate(sum, p.in.silu));
}

// Many: S sequences a thread, N channels. The states' rows come to L2 while the kernel before still runs.
template <class T, int N, int S>
__global__ void __launch_bounds__(kStepThreads) StepMany(const __grid_constant__ StateParams<T> p) {
    allow_next();
    const int64_t d = p.in.d(), first = static_cast<int64_t>(blockIdx.y) * S;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) * N;
    if (channel >= d) return wait_for_inputs();
    T* state[S];
    const int left = static_cast<int>(p.in.x.shape[0] - first < S ? p.in.x.shape[0] - first : S);
#pragma unroll
    for (int s = 0; s < S; ++s) {
        const int64_t at = first + (s < left ? s : 0);
        state[s] = p.state.data + (p.slots != nullptr ? p.slots[at] : at) * p.state.stride + channel;
    }
    Pack<float, kTaps> weight[N];
    Pack<float, N> bias = {};
#pragma unroll
    for (int n = 0; n < N; ++n) weight[n] = load_pack<kTaps>(p.in.weight.data + (channel + n) * kTaps);
    if (p.in.bias.data != nullptr) bias = load_pack<N>(p.in.bias.data + channel);
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j)
            if (threadIdx.x % (128 / sizeof(T) / N) == 0) prefetch_l2(state[s] + j * d);
    wait_for_inputs();
    Raw<T, N> rows[S][kTaps];
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
        for (int j = 0; j < kTaps; ++j)
            if (s < left)
                rows[s][j] = load_raw<N>(j < kTaps - 1 ? state[s] + j * d
                                                       : p.in.x.data + (first + s) * p.in.x.stride + channel);
#pragma unroll
    for (int s = 0; s < S; ++s) {
        if (s >= left) break;
        Pack<float, N> y = bias;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) {
            const Pack<float, N> row = to_floats<T, N>(rows[s][j]);
#pragma unroll
            for (int n = 0; n < N; ++n) y.at[n] = fmaf(weight[n].at[j], row.at[n], y.at[n]);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) y.at[n] = activate(y.at[n], p.in.silu);
        store_floats(p.y.data + (first + s) * p.y.stride + channel, y);
    }
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
        for (int j = 1; j < kTaps; ++j)
            if (s < left) *reinterpret_cast<Raw<T, N>*>(state[s] + (j - 1) * d) = rows[s][j];
}

template <class T, int N>
__global__ void __launch_bounds__(kConvThreads) Step(const __grid_constant__ StateParams<T> p) {
    const int64_t d = p.in.d(), packs = d / N, k = p.in.k();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t s = i / packs, channel = i % packs * N;
    if (s >= p.in.x.shape[0]) return;
    const int64_t slot = p.slots != nullptr ? p.slots[s] : s;
    T* state = p.state.data + slot * p.state.stride + channel;
    const float* weight = p.in.weight.data + channel * p.in.weight.stride;
    const Pack<T, N> x = load_pack<N>(p.in.x.data + s * p.in.x.stride + channel);
    Pack<float, N> sum;
#pragma unroll
    for (int n = 0; n < N; ++n)
        sum.at[n] = p.in.bias.data != nullptr ? p.in.bias.data[(channel + n) * p.in.bias.stride] : 0.0f;
    for (int64_t j = 0; j < k; ++j) {
        const Pack<T, N> row = j < k - 1 ? load_pack<N>(state + j * d) : x;
        if (j > 0) store_pack(state + (j - 1) * d, row);
#pragma unroll
        for (int n = 0; n < N; ++n)
            sum.at[n] = fmaf(weight[n * p.in.weight.stride + j], to_float(row.at[n]), sum.at[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) sum.at[n] = activate(sum.at[n], p.in.silu);
    store_floats(p.y.data + s * p.y.stride + channel, sum);
}

}  // namespace

template <class T>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state) {
    constexpr int N = 4;  // 8 of bf16, 16 bytes, cost registers that more threads use better (README)
    const int64_t t = in.x.shape[0], d = in.x.shape[1], k = in.weight.shape[1];
    const SequencesOnDevice sequences(ex, in.cu_seqlens);
    ForwardParams<T> p{conv_inputs(in, sequences.get()), y, conv_run(ex, t * d / N, 64)};
    while ((t + p.run * kRuns - 1) / (p.run * kRuns) > 65535) p.run *= 2;
    const auto grid = [&](int64_t n) { return dim3(blocks_for(d, kWarp * n), blocks_for(t, p.run * kRuns)); };
    if (t * d == 0) {
    } else if (k > kTaps) {
        ForwardPlain<T><<<blocks_for(t * d, kConvThreads), kConvThreads, 0, stream_of(ex)>>>(p);
    } else if (d % N == 0 && conv_packable(in.x, N) && conv_packable(y, N) &&
               conv_packable(in.initial_state, N)) {
        Forward<T, N><<<grid(N), kConvThreads, 0, stream_of(ex)>>>(p);
    } else {
        Forward<T, 1><<<grid(1), kConvThreads, 0, stream_of(ex)>>>(p);
    }
    check_launch(kOp);
    const int64_t states = sequences.get().count * d;
    if (!final_state || states == 0 || k == 1) return;
    FinalState<T>
        <<<blocks_for(states, kConvThreads), kConvThreads, 0, stream_of(ex)>>>({p.in, final_state, {}});
    check_launch(kOp);
}

template <class T>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y) {
    constexpr int N = 16 / sizeof(T);
    const int64_t s = in.x.shape[0], d = in.x.shape[1];
    if (s * d == 0) return;
    const StateParams<T> p{conv_inputs(in, {}), state, y, in.slots.data};
    const auto packs_of = [&](int64_t n) {
        return d % n == 0 && conv_packable(in.x, n) && conv_packable(y, n) && conv_packable(state, n);
    };
    if (in.weight.shape[1] == kTaps && s <= 65535 && packable(in.weight.data, in.weight.stride, kTaps) &&
        in.weight.stride == kTaps && (!in.bias || in.bias.stride == 1) && packable(in.bias.data, 0, kTaps)) {
        constexpr int kPack = 2, kSequences = 2;
        const bool many = packs_of(kPack) && s * d >= int64_t{1024} * ex.cuda->multiprocessors();
        const dim3 blocks(blocks_for(many ? d / kPack : d, kStepThreads),
                          static_cast<unsigned>(many ? (s + kSequences - 1) / kSequences : s));
        const auto kernel = many ? StepMany<T, kPack, kSequences> : StepTaps<T>;
        return launch_overlapped(ex, kOp, kernel, {blocks, kStepThreads}, p);
    }
    // Few channels: a thread each.
    const bool packs = s * d >= int64_t{8192} * ex.cuda->multiprocessors() && packs_of(N);
    if (packs) {
        Step<T, N><<<blocks_for(s * d / N, kConvThreads), kConvThreads, 0, stream_of(ex)>>>(p);
    } else {
        Step<T, 1><<<blocks_for(s * d, kConvThreads), kConvThreads, 0, stream_of(ex)>>>(p);
    }
    check_launch(kOp);
}

template void causal_conv1d(const Exec&, const CausalConv1dInputs<float>&, View<float, 2>, View<float, 3>);
template void causal_conv1d(const Exec&, const CausalConv1dInputs<bf16>&, View<bf16, 2>, View<bf16, 3>);
template void causal_conv1d_step(const Exec&, const CausalConv1dInputs<float>&, View<float, 3>,
                                 View<float, 2>);
template void causal_conv1d_step(const Exec&, const CausalConv1dInputs<bf16>&, View<bf16, 3>, View<bf16, 2>);

}  // namespace ssm::cuda
