// The selective scan on the CPU: sequence and step. See README.md for the layout and what was measured.
#include "ssm/ops/selective_scan/selective_scan_impl.h"

#include <omp.h>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/selective_scan/selective_scan_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"
#include "ssm/ops/selective_scan/selective_scan_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

// Tokens whose dt, dt u and y are held in L1 at a time.
constexpr int64_t kTile = 64;
// State indices whose h is held in registers at a time.
constexpr size_t kStatePiece = kLanes >= 16 ? 16 : 8;
// Blocks that walk through time together, tile by tile, so that whole rows are read.
constexpr int64_t kGroupBlocks = 8;

struct Tile {
    alignas(64) float dt[kTile * kLanes];  // log2(e) dt
    alignas(64) float x[kTile * kLanes];   // dt u
    alignas(64) float y[kTile * kLanes];   // D u, then + C h

    Tile() {}  // not zeroed
};

// One block of channels c, c + 1, ... walking through time.
template <class T, class Lanes>
struct BlockWalk {
    const SelectiveScanInputs<T>& in;
    int64_t c;
    Lanes lanes;
    const float* A;  // [n kLanes]
    float* h;        // [n kLanes]
    // What is walked after this: so many tokens on, at channel next_c.
    int64_t next_tokens, next_c;
    Tile tile;

    // A block's part of a row is one cache line and the next row lies far away, so no hardware prefetcher
    // follows: asks for what Finish will touch of token t, and for the inputs of the next block. The loop
    // over the states does, spread over its time: a burst would wait for the few lines that may be under way
    // at once.
    template <bool kReadOut>
    HWY_INLINE void PrefetchToken(int64_t t, View<T, 2> y) const noexcept {
        const int64_t next = std::min(t + next_tokens, in.u.shape[0] - 1);
        hwy::Prefetch(in.delta.row(next) + next_c);
        hwy::Prefetch(in.u.row(next) + next_c);
        if constexpr (kReadOut) {
            if (in.z) hwy::Prefetch(in.z.row(t) + c);
            hwy::Prefetch(y.row(t) + c);
        }
    }

    // dt, x and, if kReadOut, D u of tokens t .. t + count; returns the sum of dt.
    template <bool kReadOut>
    HWY_INLINE ScanVec Prepare(int64_t t, int64_t count) noexcept {
        const ScanTag d;
        const ScanVec bias = LoadChannels(in.delta_bias, c, lanes), skip = LoadChannels(in.D, c, lanes);
        const ScanVec log2e = hn::Set(d, kLog2e);
        ScanVec sum = hn::Zero(d);
        for (int64_t i = 0; i < count; ++i) {
            ScanVec dt = hn::Add(Load(d, in.delta.row(t + i) + c, lanes), bias);
            if (in.delta_softplus) dt = Softplus(d, dt);
            const ScanVec u = Load(d, in.u.row(t + i) + c, lanes);
            hn::Store(hn::Mul(dt, u), d, tile.x + i * kLanes);
            if constexpr (kReadOut) hn::Store(hn::Mul(skip, u), d, tile.y + i * kLanes);
            dt = hn::Mul(dt, log2e);
            hn::Store(dt, d, tile.dt + i * kLanes);
            sum = hn::Add(sum, dt);
        }
        return sum;
    }

    // h of kCount state indices from j on, through the tile.
    template <bool kReadOut, size_t kCount>
    HWY_INLINE void Scan(int64_t t, int64_t count, int64_t j, View<T, 2> y) noexcept {
        const ScanTag d;
        ScanVec state[kCount];
        Unroll<kCount>([&](auto n) HWY_ATTR
                       __attribute__((always_inline)) { state[n] = hn::Load(d, h + (j + n) * kLanes); });
        const float *B = in.B.row(t) + j, *C = in.C.row(t) + j, *decay = A + j * kLanes;
        for (int64_t i = 0; i < count; ++i, B += in.B.stride, C += in.C.stride) {
            const ScanVec dt = hn::Load(d, tile.dt + i * kLanes), x = hn::Load(d, tile.x + i * kLanes);
            if (j == 0) PrefetchToken<kReadOut>(t + i, y);
            ScanVec sum[2] = {hn::Zero(d), hn::Zero(d)};
            Unroll<kCount>([&](auto n) HWY_ATTR __attribute__((always_inline)) {
                const ScanVec A_bar = Exp2Fast(d, hn::Mul(dt, hn::Load(d, decay + n * kLanes)));
                state[n] = hn::MulAdd(A_bar, state[n], hn::Mul(x, hn::Set(d, B[n])));
                if constexpr (kReadOut) sum[n % 2] = hn::MulAdd(state[n], hn::Set(d, C[n]), sum[n % 2]);
            });
            if constexpr (kReadOut) {
                float* out = tile.y + i * kLanes;
                hn::Store(hn::Add(hn::Load(d, out), hn::Add(sum[0], sum[1])), d, out);
            }
        }
        Unroll<kCount>([&](auto n) HWY_ATTR
                       __attribute__((always_inline)) { hn::Store(state[n], d, h + (j + n) * kLanes); });
    }

    // Gate and write y.
    HWY_INLINE void Finish(int64_t t, int64_t count, View<T, 2> y) noexcept {
        const ScanTag d;
        for (int64_t i = 0; i < count; ++i) {
            ScanVec out = hn::Load(d, tile.y + i * kLanes);
            if (in.z) out = hn::Mul(out, Silu(d, Load(d, in.z.row(t + i) + c, lanes)));
            Store(d, out, y.row(t + i) + c, lanes);
        }
    }

    // Tokens begin .. end; h enters and leaves in `h`. With kReadOut writes y, else only advances h. Returns
    // the sum of log2(e) dt.
    template <bool kReadOut>
    ScanVec Walk(int64_t begin, int64_t end, View<T, 2> y) noexcept {
        ScanVec sum = hn::Zero(ScanTag());
        for (int64_t t = begin; t < end; t += kTile) {
            const int64_t count = std::min(kTile, end - t);
            sum = hn::Add(sum, Prepare<kReadOut>(t, count));
            ForEachStatePiece<kStatePiece>(in.A.shape[1], [&](int64_t j, auto size) HWY_ATTR {
                Scan<kReadOut, decltype(size)::value>(t, count, j, y);
            });
            if constexpr (kReadOut) Finish(t, count, y);
        }
        return sum;
    }
};

// Everything of one call.
template <class T>
struct Forward {
    const SelectiveScanInputs<T>& in;
    View<T, 2> y;
    View<float, 3> final_state, chunk_states;
    int64_t chunk;
    std::vector<int64_t> first_chunk;  // [s+1]

    int64_t sequences() const { return static_cast<int64_t>(in.cu_seqlens.size()) - 1; }
    int64_t d() const { return in.u.shape[1]; }
    int64_t n() const { return in.A.shape[1]; }
    int64_t blocks() const { return (d() + kLanes - 1) / kLanes; }

    // Sequence s of the blocks from channel c to channel end, from its first token to its last. A, h: one
    // [n L] a block.
    void RunSequence(int64_t s, int64_t c, int64_t end, const float* A, float* h) noexcept {
        const int64_t size = n() * kLanes, first = in.cu_seqlens[s], last = in.cu_seqlens[s + 1];
        // f(channel, the block's offset into A and h)
        auto for_each_block = [&](auto&& f) {
            for (int64_t b = 0; c + b * kLanes < end; ++b) f(c + b * kLanes, b * size);
        };
        for_each_block([&](int64_t at, int64_t offset) {
            const float* rows = in.initial_state ? in.initial_state.row(s) + at * n() : nullptr;
            LoadBlock(rows, n(), d() - at, n(), h + offset);
        });
        for (int64_t t = first; t < last;) {
            const int64_t index = first_chunk[s] + (t - first) / chunk, into = (t - first) % chunk;
            if (chunk_states && into == 0) {
                for_each_block([&](int64_t at, int64_t offset) {
                    StoreBlock(h + offset, d() - at, n(), chunk_states.row(index) + at * n(), n());
                });
            }
            const int64_t limit = chunk_states ? std::min(kTile, chunk - into) : kTile;
            const int64_t next = std::min(t + limit, last);
            for_each_block([&](int64_t at, int64_t offset) {
                const int64_t after = at + kLanes < end ? at + kLanes : c;
                WithLanes(at, d(),
                          [&](auto lanes) { Advance(t, next, at, after, lanes, A + offset, h + offset); });
            });
            t = next;
        }
        for_each_block([&](int64_t at, int64_t offset) {
            if (final_state) StoreBlock(h + offset, d() - at, n(), final_state.row(s) + at * n(), n());
        });
    }
    template <class Lanes>
    void Advance(int64_t begin, int64_t end, int64_t c, int64_t next_c, Lanes lanes, const float* A,
                 float* h) noexcept {
        BlockWalk<T, Lanes> walk{in, c, lanes, A, h, next_c <= c ? end - begin : 0, next_c, {}};
        walk.template Walk<true>(begin, end, y);
    }

    // Parallel over groups of blocks and sequences; the result does not depend on the size of a group.
    void Run(const Exec& ex) {
        const int64_t count = sequences();
        const int64_t share = blocks() * count / std::max(ex.threads, 1);
        const int64_t width = std::clamp<int64_t>(share, 1, kGroupBlocks) * kLanes;  // channels of a group
        parallel_for(ex, (d() + width - 1) / width * count, 1, [&](int64_t begin, int64_t end) {
            Scratch<float> scratch(ex, static_cast<size_t>(2 * n() * width));
            float *A = scratch.data(), *h = A + n() * width;
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t c = unit / count * width, s = unit % count, limit = std::min(c + width, d());
                for (int64_t at = c; at < limit && (unit == begin || s == 0); at += kLanes) {
                    LoadBlock(in.A.row(at), in.A.stride, d() - at, n(), A + (at - c) * n());
                }
                RunSequence(s, c, limit, A, h);
            }
        });
    }

    // Parallel over time too, in three passes over the chunks. Pass 1 scans each chunk from a zero state: its
    // end state, and the sum of dt, which gives the product of its decays as exp(A sum dt).
    void LocalScans(const Exec& ex, View<float, 3> states, float* sums) {
        const int64_t chunks = first_chunk.back();
        parallel_for(ex, blocks() * chunks, 1, [&](int64_t begin, int64_t end) {
            Scratch<float> scratch(ex, 2 * n() * kLanes);
            float *A = scratch.data(), *h = A + n() * kLanes;
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t c = unit / chunks * kLanes, index = unit % chunks;
                LoadBlock(in.A.row(c), in.A.stride, d() - c, n(), A);
                std::fill_n(h, n() * kLanes, 0.0f);
                const auto [first, last] = Tokens(index);
                WithLanes(c, d(), [&, first = first, last = last](auto lanes) {
                    AdvanceChunk(first, last, c, lanes, A, h, sums + index * blocks() * kLanes + c);
                });
                StoreBlock(h, d() - c, n(), states.row(index) + c * n(), n());
            }
        });
    }
    template <class Lanes>
    void AdvanceChunk(int64_t first, int64_t last, int64_t c, Lanes lanes, const float* A, float* h,
                      float* sum) noexcept {
        BlockWalk<T, Lanes> walk{in, c, lanes, A, h, kTile, c, {}};
        hn::StoreU(walk.template Walk<false>(first, last, y), ScanTag(), sum);
    }
    // Tokens of a chunk.
    std::pair<int64_t, int64_t> Tokens(int64_t index) const {
        const auto after = std::upper_bound(first_chunk.begin(), first_chunk.end(), index);
        const int64_t s = after - first_chunk.begin() - 1;
        const int64_t begin = in.cu_seqlens[s] + (index - first_chunk[s]) * chunk;
        return {begin, std::min(begin + chunk, in.cu_seqlens[s + 1])};
    }

    // Pass 2 carries along each sequence: states[i], the end state of chunk i alone, becomes the state that
    // enters chunk i.
    void Carry(const Exec& ex, View<float, 3> states, const float* sums) {
        parallel_for(ex, d(), kLanes, [&](int64_t begin, int64_t end) {
            Scratch<float> carried(ex, n());
            for (int64_t c = begin; c < end; ++c) {
                for (int64_t s = 0; s < sequences(); ++s) CarryChannel(s, c, states, sums, carried.data());
            }
        });
    }
    void CarryChannel(int64_t s, int64_t c, View<float, 3> states, const float* sums, float* h) noexcept {
        const hn::CappedTag<float, 1> one;
        for (int64_t j = 0; j < n(); ++j) h[j] = in.initial_state ? in.initial_state(s, c, j) : 0.0f;
        for (int64_t index = first_chunk[s]; index < first_chunk[s + 1]; ++index) {
            float* state = states.row(index) + c * n();
            const float sum = sums[index * blocks() * kLanes + c];
            for (int64_t j = 0; j < n(); ++j) {
                const float decay = hn::GetLane(Exp2Fast(one, hn::Set(one, sum * in.A(c, j))));
                const float end = decay * h[j] + state[j];
                state[j] = h[j];
                h[j] = end;
            }
        }
        if (final_state) std::copy_n(h, n(), final_state.row(s) + c * n());
    }

    // Pass 3 scans each chunk again, from the state that enters it, and reads it out.
    void Finish(const Exec& ex, View<float, 3> states) {
        const int64_t chunks = first_chunk.back();
        parallel_for(ex, blocks() * chunks, 1, [&](int64_t begin, int64_t end) {
            Scratch<float> scratch(ex, 2 * n() * kLanes);
            float *A = scratch.data(), *h = A + n() * kLanes;
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t c = unit / chunks * kLanes, index = unit % chunks;
                LoadBlock(in.A.row(c), in.A.stride, d() - c, n(), A);
                LoadBlock(states.row(index) + c * n(), n(), d() - c, n(), h);
                const auto [first, last] = Tokens(index);
                WithLanes(c, d(), [&, first = first, last = last](auto lanes) {
                    Advance(first, last, c, c, lanes, A, h);
                });
            }
        });
    }
    void RunOverTime(const Exec& ex) {
        const int64_t chunks = first_chunk.back();
        Scratch<float> sums(ex, chunks * blocks() * kLanes);
        Scratch<float> own(ex, chunk_states ? 0 : chunks * d() * n());
        const View<float, 3> states =
            chunk_states ? chunk_states : View<float, 3>(own.data(), {chunks, d(), n()});
        LocalScans(ex, states, sums.data());
        Carry(ex, states, sums.data());
        Finish(ex, states);
    }
};

// Time is split only where it pays: its passes cost twice the work.
bool SplitTime(const Exec& ex, int64_t units, int64_t chunks, SelectiveScanOptions::TimeParallel choice) {
    if (choice != SelectiveScanOptions::TimeParallel::automatic) {
        return choice == SelectiveScanOptions::TimeParallel::always;
    }
    return ex.threads > 2 * units && chunks > 2 * units;
}

template <class T>
void Sequence(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y, View<float, 3> final_state,
              View<float, 3> chunk_states, const SelectiveScanOptions& options) {
    Forward<T> forward{in,
                       y,
                       final_state,
                       chunk_states,
                       options.chunk,
                       selective_scan_first_chunks(in.cu_seqlens, options.chunk)};
    const int64_t chunks = forward.first_chunk.back();
    if (SplitTime(ex, forward.blocks() * forward.sequences(), chunks, options.time_parallel)) {
        forward.RunOverTime(ex);
    } else {
        forward.Run(ex);
    }
}

// ---- step: the state's layout [d n] is the caller's, so here the lanes are state indices -----------------

constexpr int64_t kStepChannels = 64;

// Advances the state of channel c of row s; C h is the sum of the lanes of the result.
template <class D, class T>
HWY_INLINE hn::Vec<D> AdvanceChannel(D d, const SelectiveScanInputs<T>& in, int64_t s, int64_t c, float dt,
                                     float x, float* state) {
    const int64_t n = in.A.shape[1], width = static_cast<int64_t>(hn::Lanes(d));
    const float *A = in.A.row(c), *B = in.B.row(s), *C = in.C.row(s);
    float* h = state + c * n;
    auto sum = hn::Zero(d);
    for (int64_t j = 0; j < n; j += width) {
        const auto A_bar = Exp2Fast(d, hn::Mul(hn::Set(d, dt), hn::LoadU(d, A + j)));
        const auto input = hn::Mul(hn::Set(d, x), hn::LoadU(d, B + j));
        const auto next = hn::MulAdd(A_bar, hn::LoadU(d, h + j), input);
        hn::StoreU(next, d, h + j);
        sum = hn::MulAdd(next, hn::LoadU(d, C + j), sum);
    }
    return sum;
}

// Channels c .. c + count of row s; every row of n floats is a whole number of vectors of D.
template <class D, class T>
void StepChannels(D d, const SelectiveScanInputs<T>& in, float* state, View<T, 2> y, int64_t s, int64_t c,
                  int64_t count) noexcept {
    const ScanTag wide;
    alignas(64) float dt[kStepChannels], x[kStepChannels], out[kStepChannels];
    ForEachVector(wide, count, [&](int64_t i, auto lanes) HWY_ATTR {
        ScanVec v =
            hn::Add(Load(wide, in.delta.row(s) + c + i, lanes), LoadChannels(in.delta_bias, c + i, lanes));
        if (in.delta_softplus) v = Softplus(wide, v);
        const ScanVec u = Load(wide, in.u.row(s) + c + i, lanes);
        hn::Store(hn::Mul(v, hn::Set(wide, kLog2e)), wide, dt + i);
        hn::Store(hn::Mul(v, u), wide, x + i);
        hn::Store(hn::Mul(LoadChannels(in.D, c + i, lanes), u), wide, out + i);
    });
    // Advances channel c + k; the sum of the lanes is C h.
    auto advance = [&](int64_t k) HWY_ATTR __attribute__((always_inline)) {
        return AdvanceChannel(d, in, s, c + k, dt[k], x[k], state);
    };
    alignas(64) float read[kStepChannels];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        StoreSums(d, advance(i), advance(i + 1), advance(i + 2), advance(i + 3), read + i);
    }
    for (; i < count; ++i) read[i] = SumToFloat(d, advance(i));
    ForEachVector(wide, count, [&](int64_t k, auto lanes) HWY_ATTR {
        ScanVec v = hn::Add(hn::Load(wide, out + k), Load(wide, read + k, lanes));
        if (in.z) v = hn::Mul(v, Silu(wide, Load(wide, in.z.row(s) + c + k, lanes)));
        Store(wide, v, y.row(s) + c + k, lanes);
    });
}

template <class T>
void Step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state, View<T, 2> y) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1];
    const int64_t pieces = (d + kStepChannels - 1) / kStepChannels;
    // Below 256 channels another thread costs more than it saves.
    parallel_for(ex, in.u.shape[0] * pieces, 4, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t s = unit / pieces, c = unit % pieces * kStepChannels;
            const int64_t count = std::min(kStepChannels, d - c);
            float* const states = state.row(slot_of(in.slots, s));
            if (n % kLanes == 0) {
                StepChannels(ScanTag(), in, states, y, s, c, count);
            } else if (n % 4 == 0) {
                StepChannels(hn::CappedTag<float, 4>(), in, states, y, s, c, count);
            } else {
                StepChannels(hn::CappedTag<float, 1>(), in, states, y, s, c, count);
            }
        }
    });
}

void SequenceF32(const Exec& ex, const SelectiveScanInputs<float>& in, View<float, 2> y,
                 View<float, 3> final_state, View<float, 3> chunk_states,
                 const SelectiveScanOptions& options) {
    Sequence(ex, in, y, final_state, chunk_states, options);
}
void SequenceBf16(const Exec& ex, const SelectiveScanInputs<bf16>& in, View<bf16, 2> y,
                  View<float, 3> final_state, View<float, 3> chunk_states,
                  const SelectiveScanOptions& options) {
    Sequence(ex, in, y, final_state, chunk_states, options);
}
void StepF32(const Exec& ex, const SelectiveScanInputs<float>& in, View<float, 3> state, View<float, 2> y) {
    Step(ex, in, state, y);
}
void StepBf16(const Exec& ex, const SelectiveScanInputs<bf16>& in, View<float, 3> state, View<bf16, 2> y) {
    Step(ex, in, state, y);
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(SequenceF32);
HWY_EXPORT(SequenceBf16);
HWY_EXPORT(StepF32);
HWY_EXPORT(StepBf16);

namespace cpu {

template <>
void selective_scan(const Exec& ex, const SelectiveScanInputs<float>& in, View<float, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options) {
    HWY_DYNAMIC_DISPATCH(SequenceF32)(ex, in, y, final_state, chunk_states, options);
}
template <>
void selective_scan(const Exec& ex, const SelectiveScanInputs<bf16>& in, View<bf16, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options) {
    HWY_DYNAMIC_DISPATCH(SequenceBf16)(ex, in, y, final_state, chunk_states, options);
}
template <>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<float>& in, View<float, 3> state,
                         View<float, 2> y) {
    HWY_DYNAMIC_DISPATCH(StepF32)(ex, in, state, y);
}
template <>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<bf16>& in, View<float, 3> state,
                         View<bf16, 2> y) {
    HWY_DYNAMIC_DISPATCH(StepBf16)(ex, in, state, y);
}

}  // namespace cpu
}  // namespace ssm
#endif  // HWY_ONCE
