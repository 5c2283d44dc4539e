// What the CUDA kernels of the causal convolution share: which sequence a token is in, inputs before its
// start, the filter in registers. Private to ssm/ops/causal_conv1d.
#pragma once

#include <type_traits>

#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/sequences.cuh"
#include "ssm/ops/causal_conv1d/causal_conv1d_impl.h"

namespace ssm::cuda {

constexpr int kConvThreads = 256;
// Of the filters in registers; shorter ones get zeros in front.
constexpr int kTaps = 4;

// The inputs of every kernel.
template <class T>
struct ConvInputs {
    View<const T, 2> x;
    View<const float, 2> weight;
    View<const float, 1> bias;
    View<const T, 3> initial_state;
    bool silu;
    Sequences sequences;

    __device__ int64_t d() const { return x.shape[1]; }
    __device__ int64_t k() const { return weight.shape[1]; }
};

// A run of tokens of one sequence: which, and where it begins and ends.
struct Segment {
    int64_t s, begin, end;
};
__device__ inline Segment segment_of(const Sequences& sequences, int64_t token) {
    int64_t low = 0, high = sequences.count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (sequences.offset(middle) <= token ? low : high) = middle;
    }
    return {low, sequences.offset(low), sequences.offset(low + 1)};
}

// N elements as they lie in memory, by words where they fill some: 16-bit elements held for a while would
// each take a register.
template <class T, int N>
constexpr bool kWords = sizeof(T) * N % 4 == 0;
template <class T, int N>
using Raw = Pack<std::conditional_t<kWords<T, N>, uint32_t, T>,
                 kWords<T, N> ? static_cast<int>(sizeof(T)) * N / 4 : N>;

template <int N, class T>
__device__ inline Raw<T, N> load_raw(const T* p) {
    return *reinterpret_cast<const Raw<T, N>*>(p);
}
template <class T, int N>
__device__ inline Pack<float, N> to_floats(const Raw<T, N>& raw) {
    Pack<float, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (!kWords<T, N>) {
            v.at[i] = to_float(raw.at[i]);
        } else if constexpr (sizeof(T) == 4) {
            v.at[i] = __uint_as_float(raw.at[i]);
        } else {
            const uint32_t word = raw.at[i / 2];
            v.at[i] = __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
        }
    }
    return v;
}
template <int N, class T>
__device__ inline Pack<float, N> load_floats(const T* p) {
    return to_floats<T, N>(load_raw<N>(p));
}
template <int N, class T>
__device__ inline void store_floats(T* p, const Pack<float, N>& v) {
    Raw<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (!kWords<T, N>) {
            raw.at[i] = from_float<T>(v.at[i]);
        } else if constexpr (sizeof(T) == 4) {
            raw.at[i] = __float_as_uint(v.at[i]);
        } else if (i % 2 == 0) {
            const __nv_bfloat162 two = __floats2bfloat162_rn(v.at[i], v.at[i + 1]);
            raw.at[i / 2] = reinterpret_cast<const uint32_t&>(two);
        }
    }
    *reinterpret_cast<Raw<T, N>*>(p) = raw;
}

// x at a token, before its sequence's start of the initial state, before that zero.
template <int N, class T>
__device__ inline Pack<float, N> load_input(const ConvInputs<T>& in, const Segment& segment, int64_t token,
                                            int64_t channel) {
    if (token >= segment.begin) return load_floats<N>(in.x.data + token * in.x.stride + channel);
    const int64_t row = in.k() - 1 + token - segment.begin;
    if (in.initial_state.data == nullptr || row < 0) return {};
    return load_floats<N>(in.initial_state.data + segment.s * in.initial_state.stride + row * in.d() +
                          channel);
}

// A block: the channels of a warp, N for each lane (blockIdx.x), by kRuns runs of tokens (blockIdx.y).
constexpr int kRuns = kConvThreads / kWarp;

// The filter of the block's channels. By tap, so that a lane reads its own as packs: read from memory by each
// thread, whose channels lie 16 N bytes from the next lane's, weights took most of the kernel's time.
template <int N>
struct SharedFilter {
    alignas(16) float weight[kTaps + 1][kWarp * N];  // the bias last
};

// Of N channels.
template <int N>
struct Filter {
    float weight[kTaps][N], bias[N];

    // All of the block must call it.
    template <class T>
    __device__ void load(const ConvInputs<T>& in, int64_t base, SharedFilter<N>& shared) {
        const int k = static_cast<int>(in.k());
        for (int c = threadIdx.x; c < kWarp * N && base + c < in.d(); c += kConvThreads) {
            const float* row = in.weight.data + (base + c) * in.weight.stride;
#pragma unroll
            for (int j = 0; j < kTaps; ++j)
                shared.weight[j][c] = j >= kTaps - k ? row[j - (kTaps - k)] : 0.0f;
            shared.weight[kTaps][c] =
                in.bias.data != nullptr ? in.bias.data[(base + c) * in.bias.stride] : 0.0f;
        }
        __syncthreads();
        const int first = threadIdx.x % kWarp * N;
#pragma unroll
        for (int j = 0; j <= kTaps; ++j) {
            const Pack<float, N> row = load_pack<N>(shared.weight[j] + first);
#pragma unroll
            for (int i = 0; i < N; ++i) (j < kTaps ? weight[j < kTaps ? j : 0][i] : bias[i]) = row.at[i];
        }
    }
    // What the activation sees at a token, given the inputs at it and the three before.
    __device__ float sum(const Pack<float, N>* inputs, int i) const {
        float v = bias[i];
#pragma unroll
        for (int j = 0; j < kTaps; ++j) v = fmaf(weight[j][i], inputs[j].at[i], v);
        return v;
    }
};

template <class T>
inline ConvInputs<T> conv_inputs(const CausalConv1dInputs<T>& in, const Sequences& sequences) {
    return {in.x, in.weight, in.bias, in.initial_state, in.activation == Activation::silu, sequences};
}

// Tokens of a thread: long runs read fewer rows twice, as long as enough threads are left (`packs` of
// channels and tokens in all).
inline int64_t conv_run(const Exec& ex, int64_t packs, int64_t longest) {
    int64_t run = longest;
    while (run > 4 && packs / run < int64_t{700} * ex.cuda->multiprocessors()) run /= 2;
    return run;
}

// Whether packs of n can read the rows of v.
template <class T, int R>
inline bool conv_packable(const View<T, R>& v, int64_t n) {
    return v.data == nullptr || packable(v.data, v.stride, n);
}

}  // namespace ssm::cuda
