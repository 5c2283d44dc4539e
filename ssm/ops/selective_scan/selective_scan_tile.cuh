// Of the CUDA kernels of the selective scan: a tile's elements on their way from memory, states in registers,
// the functions of a pair, products by the tensor cores. Included by .cu files only.
#pragma once

#include <type_traits>

#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/products.cuh"
#include "ssm/ops/selective_scan/selective_scan_cuda.cuh"

namespace ssm::cuda {

constexpr float kLn2 = 0.6931471805599453f;

// Exponent of two from which on a decay is taken for zero. What came before is then left out: at most that
// part of the state it had made. In f32 it is what rounding takes from a state of that size at every token;
// activations in bf16 have lost 2^-9 of themselves, and factors of a product by the tensor cores 2^-11.
template <class T>
constexpr float kNothing = sizeof(T) == 4 ? -24.0f : -16.0f;

// Two neighbours as they lie in memory: a conversion would wait for them.
template <class T>
using Two = std::conditional_t<sizeof(T) == 2, uint32_t, float2>;
__device__ inline float2 floats_of(float2 v) { return v; }
__device__ inline float2 floats_of(uint32_t v) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <class T>
__device__ inline Two<T> two_of(float2 v) {
    if constexpr (sizeof(T) == 4) {
        return v;
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(v.x, v.y);
        return reinterpret_cast<const uint32_t&>(both);
    }
}

// Where the block's channels begin, and how this thread reads its two: by one word if the arrays are `paired`
// (channel: inside of the block, of the last two if these are past the end).
template <int K, int S, int kWidth = kThreads>
struct Channels {
    using Shape = Block<K, S, kWidth>;
    int64_t d0;
    int channel;
    bool paired, whole;

    __device__ Channels(int64_t first, int64_t d, bool pairs, bool all = false)
        : d0(first),
          channel(all ? Shape::channel()
                      : min(Shape::channel(), static_cast<int>(min(d - first, int64_t{INT32_MAX})) - 2)),
          paired(pairs),
          whole(all) {}
    // From a row's element d0 of a tile's first token to the thread's first pair; inside of a tile offsets
    // are 32 bits wide (require_stride).
    __device__ int offset(int64_t stride) const {
        return Shape::token(0) * static_cast<int>(stride) + channel;
    }
};

// A tile's pairs of this thread. Past the ends of tokens and channels, the last one's: whoever uses them says
// what counts.
template <class T, int K, int S, int kWidth = kThreads>
struct PairTile {
    using Shape = Block<K, S, kWidth>;
    Two<T> at[Shape::kTwos];

    __device__ void load(const View<const T, 2>& x, int64_t t0, int count, const Channels<K, S, kWidth>& c) {
        if (!c.whole && x.data == nullptr) return;
        const T* row = x.data + t0 * x.stride + c.d0;
        if (c.whole || (c.paired && count >= kTile)) {
            const T* from = row + c.offset(x.stride);
            const int64_t apart = Shape::kApart * x.stride;
#pragma unroll
            for (int i = 0; i < Shape::kTwos; ++i, from += apart)
                at[i] = *reinterpret_cast<const Two<T>*>(from);
        } else {
            const int last = static_cast<int>(x.shape[1] - c.d0) - 1;
            const int low = min(Shape::channel(), last), high = min(Shape::channel() + 1, last);
#pragma unroll
            for (int i = 0; i < Shape::kTwos; ++i) {
                const T* from = row + min(Shape::token(i), count - 1) * static_cast<int>(x.stride);
                at[i] = two_of<T>({to_float(from[low]), to_float(from[high])});
            }
        }
    }
    __device__ float2 floats(int i) const { return floats_of(at[i]); }
};

// A tile of B or C, four states of a token at a time.
template <int K, int S, int kWidth = kThreads>
struct RowTile {
    static constexpr int kStates = K * S, kFours = kTile * kStates / kWidth / 4;
    Pack<float, 4> at[kFours];

    __device__ void load(const View<const float, 2>& x, int64_t t0, int count, bool packed,
                         bool whole = false) {
        const int j = static_cast<int>(threadIdx.x) % (kStates / 4) * 4, n = static_cast<int>(x.shape[1]);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const int t = static_cast<int>(threadIdx.x) / (kStates / 4) + i * (kWidth / (kStates / 4));
            const float* row =
                x.data + t0 * x.stride + (whole ? t : min(t, count - 1)) * static_cast<int>(x.stride);
            if (whole) {
                at[i] = load_pack<4>(row + j);
            } else if (packed) {
                at[i] = load_pack<4>(row + min(j, n - 4));
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k) at[i].at[k] = row[min(j + k, n - 1)];
            }
        }
    }
    __device__ void store(float* tile, int64_t n) const {
        const int j = static_cast<int>(threadIdx.x) % (kStates / 4) * 4;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            Pack<float, 4> v = at[i];
#pragma unroll
            for (int k = 0; k < 4; ++k) v.at[k] = j + k < n ? v.at[k] : 0.0f;
            store_pack(tile + (static_cast<int>(threadIdx.x) + i * kWidth) * 4, v);
        }
    }
};

// This thread's states of one channel, [d n] at `from`; zero past n and past d. `packed`: 16 bytes at a time.
template <int K>
__device__ inline void load_states(float (&h)[K], const float* from, int64_t channel, int64_t d, int64_t n,
                                   int part, bool packed = false) {
    if constexpr (K == 4) {
        if (packed && from != nullptr) {
            Pack<float, 4> v = {};
            if (channel < d && part * K < n) v = load_pack<4>(from + channel * n + part * K);
#pragma unroll
            for (int k = 0; k < K; ++k) h[k] = v.at[k];
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t j = part * K + k;
        h[k] = from != nullptr && channel < d && j < n ? from[channel * n + j] : 0.0f;
    }
}
template <int K>
__device__ inline void store_states(float* to, const float (&h)[K], int64_t channel, int64_t d, int64_t n,
                                    int part, bool packed = false) {
    if (channel >= d) return;
    if constexpr (K == 4) {
        if (packed) {
            if (part * K < n)
                store_pack(to + channel * n + part * K, Pack<float, 4>{{h[0], h[1], h[2], h[3]}});
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t j = part * K + k;
        if (j < n) to[channel * n + j] = h[k];
    }
}

// What enters a segment: exp(A sum) end of each one before it (in reverse: after it), sum over the dt
// between, from the nearest one on until they have decayed. A in units of log 2.
template <class T, bool kReverse, int K>
__device__ inline void enter(float (&h)[K], const Entering& from, const Segments& segments,
                             const Segments::Span& span, const float (&A)[K], int64_t channel, int64_t d,
                             int64_t n, int part) {
    float sum = 0.0f;
    const auto add = [&](const float* states, int64_t row) {
        float x[K];
        load_states(x, states + row * d * n, channel, d, n, part);
#pragma unroll
        for (int k = 0; k < K; ++k) h[k] = fmaf(exp2_fast(A[k] * sum), x[k], h[k]);
    };
#pragma unroll
    for (int k = 0; k < K; ++k) h[k] = 0.0f;
    const int64_t step = kReverse ? 1 : -1, stop = kReverse ? segments.first.offset(span.sequence + 1)
                                                            : segments.first.offset(span.sequence) - 1;
    for (int64_t i = span.index + step; i != stop; i += step) {
        add(from.ends, i);
        sum += channel < d ? from.sums[i * d + channel] : 0.0f;
        bool decayed = from.decays;
#pragma unroll
        for (int k = 0; k < K; ++k) decayed = decayed && (part * K + k >= n || A[k] * sum < kNothing<T>);
        if (decayed || channel >= d) return;
    }
    if (from.start != nullptr) add(from.start, span.sequence);
}

template <int K>
__device__ inline void load_row(float (&v)[K], const float* row) {
    constexpr int kPack = K < 4 ? K : 4;
#pragma unroll
    for (int k = 0; k < K; k += kPack) {
        const Pack<float, kPack> pack = load_pack<kPack>(row + k);
#pragma unroll
        for (int i = 0; i < kPack; ++i) v[k + i] = pack.at[i];
    }
}

// 16-byte aligned.
template <int K>
__device__ inline void store_row(float* row, const float (&v)[K]) {
    Pack<float, K> pack;
#pragma unroll
    for (int k = 0; k < K; ++k) pack.at[k] = v[k];
    store_pack(row, pack);
}

__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float sigmoid_fast(float x) { return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x)); }
__device__ inline float silu_fast(float x) { return x * sigmoid_fast(x); }

__device__ inline float2 silu_fast(float2 z) { return {silu_fast(z.x), silu_fast(z.y)}; }

// log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|) <= 1, and log(1 + e) / e is a polynomial of
// relative error 1.3e-7, 8e-6 where the numbers are rounded to bf16: no branch, and exact where exp(x) is
// small.
template <class T>
__device__ inline float softplus_fast(float x) {
    const float e = exp2_fast(-kLog2E * fabsf(x));
    float p;
    if constexpr (sizeof(T) == 4) {
        p = fmaf(5.232674070e-03f, e, -2.950514294e-02f);
        p = fmaf(p, e, 7.822576910e-02f);
        p = fmaf(p, e, -1.366322786e-01f);
        p = fmaf(p, e, 1.910599619e-01f);
        p = fmaf(p, e, -2.484297901e-01f);
        p = fmaf(p, e, 3.331909776e-01f);
        p = fmaf(p, e, -4.999949336e-01f);
        p = fmaf(p, e, 9.999999404e-01f);
    } else {
        p = fmaf(-2.386915497e-02f, e, 1.012222841e-01f);
        p = fmaf(p, e, -2.100486755e-01f);
        p = fmaf(p, e, 3.252066672e-01f);
        p = fmaf(p, e, -4.993613660e-01f);
        p = fmaf(p, e, 9.999915957e-01f);
    }
    return fmaf(p, e, fmaxf(x, 0.0f));
}
// dt of a tile's pairs: 0 past the end.
template <class T, int K, int S, int kWidth>
__device__ inline void steps_of(float2 (&dt)[Block<K, S, kWidth>::kTwos],
                                const PairTile<T, K, S, kWidth>& delta, float2 bias, bool with_softplus,
                                int count) {
    using Shape = Block<K, S, kWidth>;
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i) {
        dt[i] = delta.floats(i);
        dt[i].x += bias.x;
        dt[i].y += bias.y;
    }
    if (with_softplus) {
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) dt[i] = {softplus_fast<T>(dt[i].x), softplus_fast<T>(dt[i].y)};
    }
    if (count >= kTile) return;
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i)
        if (Shape::token(i) >= count) dt[i] = {};
}
__device__ inline float step_of(float delta, float bias, bool with_softplus) {
    return with_softplus ? softplus_fast<float>(delta + bias) : delta + bias;
}
// A number of each of the thread's two channels.
__device__ inline float2 two_channels(const float* v, int64_t channel, int64_t d) {
    return {v != nullptr && channel < d ? v[channel] : 0.0f,
            v != nullptr && channel + 1 < d ? v[channel + 1] : 0.0f};
}

// Whether sums are products of the tensor cores: tf32, 10 bits of mantissa, is more than bf16 results show.
template <class T, int K, int S>
constexpr bool kTensor = sizeof(T) == 2 && K == 4 && S == 4;

__device__ inline void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                     float b1) {
    multiply_tf32(d, __float_as_uint(a0), __float_as_uint(a1), __float_as_uint(a2), __float_as_uint(a3),
                  __float_as_uint(b0), __float_as_uint(b1));
}

}  // namespace ssm::cuda
