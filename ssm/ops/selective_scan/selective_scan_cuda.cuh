// What the forward and the backward kernels of the selective scan share. Included by .cu files only.
//
// A block of kThreads threads (kWidth where a kernel differs) owns kThreads / S channels of one segment of
// one sequence and walks it in tiles of kTile tokens. Thread `channel * S + part` keeps the states part * K
// ... + K of its channel in registers. What belongs to a (token, channel) pair - softplus, gate, sums over
// the parts - is done for a whole tile before and after the walk, two channels at a time, through shared
// memory. States past n are zero: A, B and C are read as zero there; so are tokens past the end, whose dt is
// 0.
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

// Compile-time shape of a block. Of a tile's (token, channel) pairs a thread has kTwos times two channels of
// a token: token(i), channel() and the next.
template <int K, int S, int kWidth = kThreads>
struct Block {
    static constexpr int kChannels = kWidth / S;
    static constexpr int kStates = K * S;
    static constexpr int kTwos = kTile / S / 2, kLanes = kChannels / 2, kApart = kWidth / kLanes;
    __device__ static int channel() { return static_cast<int>(threadIdx.x) % kLanes * 2; }
    __device__ static int token(int i) { return static_cast<int>(threadIdx.x) / kLanes + i * kApart; }
};

// Sequences cut into segments of `length` tokens (a multiple of kTile); an empty sequence has one, empty.
struct Segments {
    Sequences sequences, first;  // first.offset(i): index of sequence i's first segment
    int64_t length = 0, count = 0;
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
        segments_.count = count();
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

// What a split in time needs first: forward, the state at the end of each segment but the last if it began
// with zero; in reverse, the gradient of the state before each but the first if nothing came from later
// tokens. And the sums of dt. Each is a sum over tokens of exp(A times between) w row: it begins at the end
// asked for, and stops where all states of a block's channels have decayed to kNothing.
template <class T>
struct ReachParams {
    View<const T, 2> w, gate;  // u, which takes dt; in reverse grad_y, which takes silu(z) where there is one
    View<const T, 2> delta;
    View<const float, 2> A, rows;
    const float* bias;
    bool softplus, paired, packed;
    Segments segments;
    int64_t d_blocks;
    float* ends;  // [segments d n]
    float* sums;  // [segments d]
};
// What enters a segment is such a sum again, over the segments before it (Entering).
template <class T>
void selective_scan_reach(const Exec& ex, const ReachParams<T>& p, bool reverse);

// What enters the segments: of a split, from what Reach left; else `start`.
struct Entering {
    const float* start;        // the sequences' own, [s d n]; or absent
    const float *ends, *sums;  // [segments d n], [segments d]
    bool decays;               // dt >= 0
};

// Blocks worth asking for when time may be split, those that the chip holds at a time; 0 when it must not be
// split.
int64_t selective_scan_want(const Exec& ex, const SelectiveScanOptions& options, int64_t blocks,
                            int64_t per_multiprocessor);

// States at every kTile tokens, [ceil(length / kTile) of each sequence, d n], for the backward pass.
template <class T>
void selective_scan_states(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> states,
                           const SelectiveScanOptions& options);

// Whether two channels lie in one aligned word of x, wherever a thread's pairs begin.
template <class T>
bool paired(const View<T, 2>& x) {
    return x.data == nullptr || (x.shape[1] % 2 == 0 && packable(x.data, x.stride, 2));
}
// Whether rows of B or C can be read 16 bytes at a time; rows of states.
inline bool packed_rows(const View<const float, 2>& x) {
    return x.shape[1] % 4 == 0 && packable(x.data, x.stride, 4);
}
inline bool packed_states(const float* states, int64_t n) { return n % 4 == 0 && packable(states, n, 4); }

// Whether all tiles of all sequences have kTile tokens, all blocks all channels, and n is a block's K S.
template <int K, int S>
bool whole_tiles(const View<const float, 2>& A, CuSeqlens cu) {
    if (A.shape[0] % Block<K, S>::kChannels != 0 || A.shape[1] != K * S || K * S != 16) return false;
    return std::all_of(cu.begin(), cu.end(), [](int64_t at) { return at % kTile == 0; });
}

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
