// CUDA kernels of the causal convolution, backward. As forward, a thread takes a pack of channels through a
// run of tokens; gradients of inputs lag behind by k-1 tokens, so a run looks k-1 tokens further. Sums over
// tokens for weight and bias: threads, then the runs of a block, then the blocks, each in a fixed order.
#include "ssm/core/cuda/column_sums.cuh"
#include "ssm/ops/causal_conv1d/causal_conv1d_cuda.cuh"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "causal_conv1d";
constexpr int kHalo = kTaps - 1;

template <class T>
struct BackwardParams {
    ConvInputs<T> in;
    View<const T, 2> grad_y;
    View<const float, 3> grad_final_state;
    CausalConv1dGradients<T> grad;
    float* partial;  // [blocks taps+1 d], the bias last; or null
    int64_t run;     // tokens of a thread
};

// d act(v) / d v.
__device__ inline float slope(float v, bool silu) { return silu ? silu_slope(v, sigmoid(v)) : 1.0f; }

template <class T, int N>
struct Sums {
    float at[kTaps + 1][N];  // weight by tap, then bias
};

// grad x at a token, given what the window says.
template <class T, int N>
__device__ inline void put_grad_x(const BackwardParams<T>& p, const Segment& segment, int64_t token,
                                  int64_t channel, Pack<float, N> v) {
    const int64_t k = p.in.k(), row = token - (segment.end - (k - 1));
    if (p.grad_final_state.data != nullptr && row >= 0) {
        const Pack<float, N> more = load_pack<N>(
            p.grad_final_state.data + segment.s * p.grad_final_state.stride + row * p.in.d() + channel);
#pragma unroll
        for (int n = 0; n < N; ++n) v.at[n] += more.at[n];
    }
    T* out = p.grad.x.data + token * p.grad.x.stride + channel;
    if (!p.grad.set_x) {
        const Pack<float, N> old = load_floats<N>(out);
#pragma unroll
        for (int n = 0; n < N; ++n) v.at[n] += old.at[n];
    }
    store_floats(out, v);
}

// Rows of x and grad_y from a token on, read before they are worked on; zero from `seen` on.
template <class T, int N>
struct Rows {
    static constexpr int kBlock = sizeof(T) == 4 ? 2 : 4;  // more would not fit into registers
    const T *x, *grad_y;
    Raw<T, N> next_x[kBlock], next_grad[kBlock];

    __device__ void load(const BackwardParams<T>& p, int count) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
            next_x[j] = {};
            next_grad[j] = {};
            if (j < count) next_x[j] = load_raw<N>(x);
            if (j < count) next_grad[j] = load_raw<N>(grad_y);
            x += p.in.x.stride;
            grad_y += p.grad_y.stride;
        }
    }
};

// Tokens [first, last) of one sequence. `inputs`: x at this token and the three before; `pending`: what the
// gradients so far give to grad_x of the three before.
template <class T, int N>
__device__ inline void backward_run(const BackwardParams<T>& p, const Filter<N>& filter,
                                    const Segment& segment, int64_t first, int64_t last, int64_t channel,
                                    Sums<T, N>& sums) {
    using R = Rows<T, N>;
    const int own = static_cast<int>(last - first);
    const int seen = static_cast<int>((last + kHalo < segment.end ? last + kHalo : segment.end) - first);
    R rows{p.in.x.data + first * p.in.x.stride + channel,
           p.grad_y.data + first * p.grad_y.stride + channel,
           {},
           {}};
    rows.load(p, seen);
    Pack<float, N> inputs[kTaps];
    float pending[kHalo][N] = {};
#pragma unroll
    for (int j = 0; j < kHalo; ++j) inputs[j + 1] = load_input<N>(p.in, segment, first - kHalo + j, channel);
    for (int begin = 0; begin < own + kHalo; begin += R::kBlock) {
        Raw<T, N> x[R::kBlock], grads[R::kBlock];
#pragma unroll
        for (int j = 0; j < R::kBlock; ++j) {
            x[j] = rows.next_x[j];
            grads[j] = rows.next_grad[j];
        }
        rows.load(p, seen - begin - R::kBlock);
#pragma unroll
        for (int j = 0; j < R::kBlock; ++j) {
            Pack<float, N> out;
#pragma unroll
            for (int i = 0; i < kHalo; ++i) inputs[i] = inputs[i + 1];
            inputs[kHalo] = to_floats<T, N>(x[j]);
            const Pack<float, N> grad = to_floats<T, N>(grads[j]);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float g = grad.at[n] * slope(filter.sum(inputs, n), p.in.silu);
                const float counted = begin + j < own ? g : 0.0f;
#pragma unroll
                for (int i = 0; i < kTaps; ++i) sums.at[i][n] = fmaf(counted, inputs[i].at[n], sums.at[i][n]);
                sums.at[kTaps][n] += counted;
                out.at[n] = fmaf(filter.weight[0][n], g, pending[0][n]);
                pending[0][n] = fmaf(filter.weight[1][n], g, pending[1][n]);
                pending[1][n] = fmaf(filter.weight[2][n], g, pending[2][n]);
                pending[2][n] = filter.weight[3][n] * g;
            }
            const int at = begin + j - kHalo;
            if (at >= 0 && at < own && p.grad.x.data != nullptr)
                put_grad_x<T, N>(p, segment, first + at, channel, out);
        }
    }
}
static_assert(kTaps == 4);

template <class T, int N>
__global__ void __launch_bounds__(kConvThreads, N == 4 ? 2 : 3)
    Backward(const __grid_constant__ BackwardParams<T> p) {
    __shared__ SharedFilter<N> shared;
    __shared__ float columns[kRuns][kTaps + 1][kWarp * N];
    const int lane = threadIdx.x % kWarp, run = threadIdx.x / kWarp;
    const int64_t base = static_cast<int64_t>(blockIdx.x) * kWarp * N, channel = base + lane * N;
    const int64_t t = p.in.x.shape[0], d = p.in.d();
    int64_t token = (static_cast<int64_t>(blockIdx.y) * kRuns + run) * p.run;
    const int64_t last = token + p.run < t ? token + p.run : t;
    Sums<T, N> sums = {};
    Filter<N> filter;
    filter.load(p.in, base, shared);
    if (channel < d) {
        while (token < last) {
            const Segment segment = segment_of(p.in.sequences, token);
            const int64_t end = segment.end < last ? segment.end : last;
            backward_run<T, N>(p, filter, segment, token, end, channel, sums);
            token = end;
        }
    }
    if (p.partial == nullptr) return;
#pragma unroll
    for (int i = 0; i <= kTaps; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n) columns[run][i][lane * N + n] = sums.at[i][n];
    __syncthreads();
    for (int j = threadIdx.x; j < (kTaps + 1) * kWarp * N; j += kConvThreads) {
        const int tap = j / (kWarp * N), column = j % (kWarp * N);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kRuns; ++i) sum += columns[i][tap][column];
        if (base + column < d) p.partial[(blockIdx.y * (kTaps + 1) + tap) * d + base + column] = sum;
    }
}

// grad_y act' at a token, for filters of any length.
template <class T>
__device__ inline float grad_sum(const BackwardParams<T>& p, const Segment& segment, int64_t token,
                                 int64_t channel) {
    const float* weight = p.in.weight.data + channel * p.in.weight.stride;
    const int64_t k = p.in.k();
    float v = p.in.bias.data != nullptr ? p.in.bias.data[channel * p.in.bias.stride] : 0.0f;
    for (int64_t j = 0; j < k; ++j)
        v = fmaf(weight[j], load_input<1>(p.in, segment, token - k + 1 + j, channel).at[0], v);
    return to_float(p.grad_y.data[token * p.grad_y.stride + channel]) * slope(v, p.in.silu);
}

// A thread per channel of a sequence: positions before its start, oldest first.
template <class T>
__global__ void __launch_bounds__(kConvThreads) InitialState(const __grid_constant__ BackwardParams<T> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t d = p.in.d(), s = i / d, channel = i % d, k = p.in.k();
    if (s >= p.in.sequences.count) return;
    const Segment segment{s, p.in.sequences.offset(s), p.in.sequences.offset(s + 1)};
    const int64_t length = segment.end - segment.begin;
    const float* weight = p.in.weight.data + channel * p.in.weight.stride;
    for (int64_t row = 0; row < k - 1; ++row) {
        float sum = 0;
        for (int64_t q = 0; q <= row && q < length; ++q)
            sum = fmaf(weight[row - q], grad_sum(p, segment, segment.begin + q, channel), sum);
        if (p.grad_final_state.data != nullptr && row >= length)
            sum += p.grad_final_state.data[s * p.grad_final_state.stride + (row - length) * d + channel];
        p.grad.initial_state.data[s * p.grad.initial_state.stride + row * d + channel] += sum;
    }
}

// Filters of more than kTaps, a thread per token and channel: from all taps' grad_sums, then the weights.
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    GradSums(const __grid_constant__ BackwardParams<T> p, float* g) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t d = p.in.d(), token = i / d, channel = i % d;
    if (token >= p.in.x.shape[0]) return;
    g[i] = grad_sum(p, segment_of(p.in.sequences, token), token, channel);
}
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    GradX(const __grid_constant__ BackwardParams<T> p, const float* g) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    const int64_t d = p.in.d(), token = i / d, channel = i % d, k = p.in.k();
    if (token >= p.in.x.shape[0]) return;
    const Segment segment = segment_of(p.in.sequences, token);
    Pack<float, 1> v = {};
    for (int64_t j = 0; j < k && token + j < segment.end; ++j)
        v.at[0] = fmaf(p.in.weight.data[channel * p.in.weight.stride + k - 1 - j], g[i + j * d], v.at[0]);
    put_grad_x<T, 1>(p, segment, token, channel, v);
}
// blockIdx: channels, run of tokens, tap (k: the bias).
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    GradWeight(const __grid_constant__ BackwardParams<T> p, const float* g) {
    const int64_t d = p.in.d(), k = p.in.k(), tap = blockIdx.z;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
    if (channel >= d) return;
    const int64_t first = blockIdx.y * p.run, t = p.in.x.shape[0];
    const int64_t last = first + p.run < t ? first + p.run : t;
    Segment segment = segment_of(p.in.sequences, first);
    float sum = 0;
    for (int64_t token = first; token < last; ++token) {
        if (token >= segment.end) segment = segment_of(p.in.sequences, token);
        const float x = tap == k ? 1.0f : load_input<1>(p.in, segment, token - k + 1 + tap, channel).at[0];
        sum = fmaf(g[token * d + channel], x, sum);
    }
    p.partial[(blockIdx.y * (k + 1) + tap) * d + channel] = sum;
}

// Where the columns of `partial` go: [taps+1 d], of which the last k and the bias are the filter's.
struct FilterColumns {
    View<float, 2> weight;
    View<float, 1> bias;
    int64_t d, k, taps;
    __device__ float* operator()(int64_t column) const {
        const int64_t tap = column / d, channel = column % d, j = tap - (taps - k);
        if (tap == taps) return bias.data == nullptr ? nullptr : bias.data + channel * bias.stride;
        return weight.data == nullptr || j < 0 ? nullptr : weight.data + channel * weight.stride + j;
    }
};

template <class T, int N>
void backward_registers(const Exec& ex, const BackwardParams<T>& p, int64_t blocks) {
    const dim3 grid(blocks_for(p.in.x.shape[1], kWarp * N), static_cast<unsigned>(blocks));
    Backward<T, N><<<grid, kConvThreads, 0, stream_of(ex)>>>(p);
    check_launch(kOp);
}

template <class T>
void backward_plain(const Exec& ex, const BackwardParams<T>& p, int64_t blocks) {
    const int64_t t = p.in.x.shape[0], d = p.in.x.shape[1], k = p.in.weight.shape[1];
    const Scratch<float> g(ex, static_cast<size_t>(t * d));
    const unsigned all = blocks_for(t * d, kConvThreads);
    GradSums<<<all, kConvThreads, 0, stream_of(ex)>>>(p, g.data());
    check_launch(kOp);
    if (p.grad.x) {
        GradX<<<all, kConvThreads, 0, stream_of(ex)>>>(p, g.data());
        check_launch(kOp);
    }
    if (p.partial == nullptr) return;
    const dim3 grid(blocks_for(d, kConvThreads), static_cast<unsigned>(blocks), static_cast<unsigned>(k + 1));
    GradWeight<<<grid, kConvThreads, 0, stream_of(ex)>>>(p, g.data());
    check_launch(kOp);
}

}  // namespace

template <class T>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<T>& in, View<const T, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<T>& grad) {
    constexpr int N = 4;
    const int64_t t = in.x.shape[0], d = in.x.shape[1], k = in.weight.shape[1];
    const SequencesOnDevice sequences(ex, in.cu_seqlens);
    BackwardParams<T> p{conv_inputs(in, sequences.get()), grad_y, grad_final_state, grad, nullptr,
                        conv_run(ex, t * d / N, 32)};
    const bool registers = k <= kTaps;
    const bool packs = d % N == 0 && conv_packable(in.x, N) && conv_packable(in.initial_state, N) &&
                       conv_packable(grad_y, N) && conv_packable(grad_final_state, N) &&
                       conv_packable(grad.x, N);
    // At most 65535 blocks along the tokens.
    if (!registers) p.run = 256;
    while ((t + p.run - 1) / p.run > 65535) p.run *= 2;
    const int64_t tokens = registers ? p.run * kRuns : p.run, blocks = (t + tokens - 1) / tokens;
    const int64_t taps = registers ? kTaps : k;
    const bool sums = (grad.weight || grad.bias) && t * d > 0;
    const Scratch<float> partial(ex, sums ? static_cast<size_t>(blocks * (taps + 1) * d) : 0);
    if (sums) p.partial = partial.data();
    if (t * d == 0) {
    } else if (!registers) {
        backward_plain(ex, p, blocks);
    } else if (packs) {
        backward_registers<T, N>(ex, p, blocks);
    } else {
        backward_registers<T, 1>(ex, p, blocks);
    }
    if (sums)
        add_column_sums(ex, partial.data(), blocks, (taps + 1) * d,
                        FilterColumns{grad.weight, grad.bias, d, k, taps}, kOp);
    const int64_t states = sequences.get().count * d;
    if (!grad.initial_state || states == 0 || k == 1) return;
    InitialState<<<blocks_for(states, kConvThreads), kConvThreads, 0, stream_of(ex)>>>(p);
    check_launch(kOp);
}

template void causal_conv1d_backward(const Exec&, const CausalConv1dInputs<float>&, View<const float, 2>,
                                     View<const float, 3>, const CausalConv1dGradients<float>&);
template void causal_conv1d_backward(const Exec&, const CausalConv1dInputs<bf16>&, View<const bf16, 2>,
                                     View<const float, 3>, const CausalConv1dGradients<bf16>&);

}  // namespace ssm::cuda
