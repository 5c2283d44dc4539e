// What the forward and the backward kernels of the selective scan share. Included by .cu files only.
//
// A block of kThreads threads owns kThreads / S channels of one segment of one sequence and walks it in tiles
// of kTile tokens. Thread `channel * S + part` keeps the states part * K ... + K of its channel in registers.
// What belongs to a (token, channel) pair - softplus, gate, sums over the parts - is done for a whole tile
// before and after the walk, by one thread per pair, through shared memory. States past n are zero: A, B and
// C are read as zero there; so are tokens past the end, whose dt is 0.
#pragma once

#include <algorithm>
#include <vector>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/sequences.cuh"
#include "ssm/ops/selective_scan/selective_scan_impl.h"

namespace ssm::cuda {

constexpr int kThreads = 128;
constexpr int kTile = 32;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Compile-time shape of a block.
template <int K, int S>
struct Block {
    static constexpr int kChannels = kThreads / S;
    static constexpr int kStates = K * S;
    static constexpr int kPairs = kTile / S;                 // (token, channel) pairs of a tile per thread
    static constexpr int kRow = kTile * kStates / kThreads;  // elements of a tile of B per thread
};

// Sequences cut into segments of `length` tokens (a multiple of kTile); an empty sequence has one, empty.
struct Segments {
    Sequences sequences, first;  // first.offset(i): index of sequence i's first segment
    int64_t length = 0;
    bool split = false;  // some sequence has two

    struct Span {
        int64_t index, sequence, start, begin, end;  // start: of the sequence; tokens [begin, end)
        bool first, last;
    };
    __device__ Span at(int64_t index) const {
        int64_t low = 0, high = sequences.count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first.offset(middle) <= index ? low : high) = middle;
        }
        const int64_t start = sequences.offset(low), stop = sequences.offset(low + 1);
        const int64_t begin = start + (index - first.offset(low)) * length;
        return {index,
                low,
                start,
                begin,
                begin + length < stop ? begin + length : stop,
                begin == start,
                begin + length >= stop};
    }
};

// Owns what Segments points to. `want`: blocks that fill the chip; 0 forbids splitting.
class SegmentsOnDevice {
public:
    SegmentsOnDevice(const Exec& ex, CuSeqlens cu, int64_t blocks_per_segment, int64_t want)
        : first_(make_first(cu, blocks_per_segment, want, segments_.length)),
          sequences_on_device_(ex, cu),
          first_on_device_(ex, first_) {
        segments_.sequences = sequences_on_device_.get();
        segments_.first = first_on_device_.get();
        segments_.split = count() > static_cast<int64_t>(cu.size()) - 1;
    }
    const Segments& get() const { return segments_; }
    int64_t count() const { return first_.back(); }

private:
    static std::vector<int64_t> make_first(CuSeqlens cu, int64_t blocks, int64_t want, int64_t& length) {
        const int64_t tokens = std::max<int64_t>(1, cu.back() - cu.front());
        const int64_t pieces = std::max<int64_t>(1, want / std::max<int64_t>(1, blocks));
        length = want == 0 ? tokens : (tokens + pieces - 1) / pieces;
        length = (length + kTile - 1) / kTile * kTile;
        std::vector<int64_t> first{0};
        for (size_t i = 1; i < cu.size(); ++i)
            first.push_back(first.back() + std::max<int64_t>(1, (cu[i] - cu[i - 1] + length - 1) / length));
        return first;
    }

    Segments segments_;
    std::vector<int64_t> first_;
    SequencesOnDevice sequences_on_device_, first_on_device_;
};

// A tile's elements on their way from global memory, as they are there: a conversion would wait for them.
template <class T, int K, int S>
struct PairTile {
    static constexpr int kPairs = Block<K, S>::kPairs, kChannels = Block<K, S>::kChannels;
    T at[kPairs];

    // Pair i of this thread: token threadIdx.x / kChannels + i * S, channel threadIdx.x % kChannels. Past the
    // ends of both, the last one's: whoever uses them says what counts.
    __device__ void load(const View<const T, 2>& x, int64_t t0, int count, int64_t d0) {
        if (x.data == nullptr) return;
        const int channel = static_cast<int>(threadIdx.x) % kChannels,
                  first = static_cast<int>(threadIdx.x) / kChannels;
        const T* row = x.data + t0 * x.stride + min(d0 + channel, x.shape[1] - 1);
        if (count >= kTile) {
            const T* at_row = row + first * x.stride;
            const int64_t apart = S * x.stride;
#pragma unroll
            for (int i = 0; i < kPairs; ++i, at_row += apart) at[i] = *at_row;
        } else {
#pragma unroll
            for (int i = 0; i < kPairs; ++i)
                at[i] = row[min(first + i * S, count - 1) * static_cast<int>(x.stride)];
        }
    }
};

template <int K, int S>
struct RowTile {
    static constexpr int kRow = Block<K, S>::kRow, kStates = Block<K, S>::kStates;
    float at[kRow];

    __device__ void load(const View<const float, 2>& x, int64_t t0, int count) {
        const int j = static_cast<int>(threadIdx.x) % kStates,
                  first = static_cast<int>(threadIdx.x) / kStates;
        const float* row = x.data + t0 * x.stride + min(j, static_cast<int>(x.shape[1]) - 1);
#pragma unroll
        for (int i = 0; i < kRow; ++i)
            at[i] = row[min(first + i * (kThreads / kStates), count - 1) * static_cast<int>(x.stride)];
    }
    __device__ void store(float* tile, int64_t n) const {
        const bool mine = static_cast<int>(threadIdx.x) % kStates < n;
#pragma unroll
        for (int i = 0; i < kRow; ++i)
            tile[static_cast<int>(threadIdx.x) + i * kThreads] = mine ? at[i] : 0.0f;
    }
};

// This thread's states of one channel, [d n] at `row`; zero past n and past d.
template <int K>
__device__ inline void load_states(float (&h)[K], const float* from, int64_t channel, int64_t d, int64_t n,
                                   int part) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t j = part * K + k;
        h[k] = from != nullptr && channel < d && j < n ? from[channel * n + j] : 0.0f;
    }
}
template <int K>
__device__ inline void store_states(float* to, const float (&h)[K], int64_t channel, int64_t d, int64_t n,
                                    int part) {
    if (channel >= d) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t j = part * K + k;
        if (j < n) to[channel * n + j] = h[k];
    }
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

__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float sigmoid_fast(float x) { return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x)); }
__device__ inline float silu_fast(float x) { return x * sigmoid_fast(x); }

// log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|) <= 1; log(1 + e) = 2 atanh(s), s = e / (2 + e) <=
// 1/3, whose series in s^2 is fitted to a relative 1e-10: no branch, and exact where exp(x) is small.
__device__ inline float softplus_fast(float x) {
    const float e = exp2_fast(-kLog2E * fabsf(x)), s = e * reciprocal_fast(2.0f + e), q = s * s;
    float p = 2.439390789e-01f;
    p = fmaf(p, q, 2.139856057e-01f);
    p = fmaf(p, q, 2.862020740e-01f);
    p = fmaf(p, q, 3.999871125e-01f);
    p = fmaf(p, q, 6.666667903e-01f);
    p = fmaf(p, q, 2.000000000e+00f);
    return fmaf(p, s, fmaxf(x, 0.0f));
}
// dt of a tile's pairs: 0 past the end.
template <int K, int S>
__device__ inline void steps_of(float (&dt)[Block<K, S>::kPairs], const PairTile<float, K, S>& delta,
                                float bias, bool with_softplus, int count) {
    constexpr int kPairs = Block<K, S>::kPairs;
    const int first = static_cast<int>(threadIdx.x) / Block<K, S>::kChannels;
    if (with_softplus) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) dt[i] = softplus_fast(delta.at[i] + bias);
    } else {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) dt[i] = delta.at[i] + bias;
    }
    if (count >= kTile) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
        if (first + i * S >= count) dt[i] = 0.0f;
}
__device__ inline float step_of(float delta, float bias, bool with_softplus) {
    return with_softplus ? softplus_fast(delta + bias) : delta + bias;
}

// Local ends of the segments become what enters each: carry <- exp(A sum dt) carry + end. Forward in time or
// back. ends: [segments d n], sums: [segments d], start: [s d n] or absent.
struct CombineParams {
    Segments segments;
    const float* start;
    const float* A;
    int64_t a_stride, d, n;
    float* ends;
    const float* sums;
};
void selective_scan_combine(const Exec& ex, const CombineParams& p, bool reverse);

// Blocks worth asking for when time may be split; 0 when it must not be.
int64_t selective_scan_want(const Exec& ex, const SelectiveScanOptions& options, int64_t blocks,
                            int64_t enough_per_multiprocessor, int64_t want_per_multiprocessor);

// States at every kTile tokens, [ceil(length / kTile) of each sequence, d n], for the backward pass.
template <class T>
void selective_scan_states(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> states,
                           const SelectiveScanOptions& options);

// Inside a tile offsets are 32 bits wide.
template <class T>
void require_stride(const View<T, 2>& x) {
    require(x.stride < INT32_MAX / kTile, "selective_scan", "rows lie {} elements apart, too far for a GPU",
            x.stride);
}

// Calls f with Block's K and S for n states.
template <class F>
void with_block(int64_t n, const F& f) {
    if (n <= 16) return f(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
    require(n <= 64, "selective_scan", "`A` must be [d n] with n <= 64 on a GPU but n is {}", n);
    f(std::integral_constant<int, 4>{}, std::integral_constant<int, 16>{});
}

}  // namespace ssm::cuda
