// Gradients of the selective scan on the CPU. README.md derives the equations used here:
//
//   g = grad_y silu(z)                          gh += g C;     gC += sum_d g h;      gB += sum_d gh dt u
//   s = sum_n gh B,  e = gh A_bar h[t-1]        gu = D g + dt s;    gdt = sum_n e A + u s;   gA += dt e
//   gh <- A_bar gh
//
// One unit of work is a group of channels: it walks all sequences, the chunks of each from last to first.
// Sums over channels are kept per group and added over the groups in their order, whatever the threads.
#include "ssm/ops/selective_scan/selective_scan_impl.h"

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/selective_scan/selective_scan_backward_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"
#include "ssm/ops/selective_scan/selective_scan_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

constexpr int64_t kGroup = 64;  // channels; a whole number of blocks on every target
constexpr int64_t kGroupBlocks = kGroup / kLanes;
// State indices whose gh and gA are held in registers at a time.
constexpr int64_t kBackPiece = 8;
constexpr float kLn2 = 0.6931471806f;

// Memory of one unit; q is the longest chunk, L the lanes. Hands out 64-byte aligned pieces of one array.
struct GroupMemory {
    // Of each block of the group, n L each: A; the gradient of the state leaving the chunk; the gradient of
    // A.
    float *A, *gh, *gA;
    float *gD, *gbias;  // [blocks L]
    // Of one block and chunk, [q L]: log2(e) dt, its derivative, u, dt u, g, grad_y silu'(z), y before the
    // gate, s, sum e A.
    float *dt, *slope, *u, *x, *g, *gz, *y, *s, *e;
    float *A_bar, *h;  // of one piece of the states, [q piece L], [q+1 piece L]
    float *gB, *gC;    // of the group, [q n L]

    static int64_t size(int64_t n, int64_t q) {
        return (3 * n + 2) * kGroup + (9 * q + (2 * q + 1) * kBackPiece + 2 * q * n) * kLanes;
    }
    GroupMemory(float* p, int64_t n, int64_t q) {
        auto take = [&p](int64_t count) { return std::exchange(p, p + count); };
        A = take(n * kGroup), gh = take(n * kGroup), gA = take(n * kGroup);
        gD = take(kGroup), gbias = take(kGroup);
        dt = take(q * kLanes), slope = take(q * kLanes), u = take(q * kLanes);
        x = take(q * kLanes), g = take(q * kLanes), gz = take(q * kLanes);
        y = take(q * kLanes), s = take(q * kLanes), e = take(q * kLanes);
        A_bar = take(q * kBackPiece * kLanes), h = take((q + 1) * kBackPiece * kLanes);
        gB = take(q * n * kLanes), gC = take(q * n * kLanes);
    }
};

// log(1 + e^x) and its derivative 1 / (1 + e^-x), from one exponential.
HWY_INLINE ScanVec SoftplusWithSlope(ScanVec x, ScanVec& slope) {
    const ScanTag d;
    const ScanVec one = hn::Set(d, 1.0f), zero = hn::Zero(d);
    const ScanVec y = Exp(d, hn::Neg(hn::Abs(x)));
    slope = hn::Div(hn::IfThenElse(hn::Lt(x, zero), y, one), hn::Add(one, y));
    return hn::Add(hn::Max(x, zero), Log1pUnit(d, y));
}

template <class Lanes>
HWY_INLINE void AddOrSet(bool set, float* p, ScanVec v, Lanes lanes) {
    const ScanTag d;
    Store(d, set ? v : hn::Add(Load(d, p, lanes), v), p, lanes);
}

// One block of channels of one chunk: tokens t .. t + count, channels c ...
template <class Lanes>
struct ChunkBackward {
    const SelectiveScanInputs<float>& in;
    View<const float, 2> grad_y;
    const SelectiveScanGradients<float>& grad;
    const GroupMemory& memory;
    int64_t block;  // within the group
    int64_t t, count, c;
    int64_t next_t, next_c;  // the block that comes after this one: prefetched
    Lanes lanes;

    // No hardware prefetcher follows one cache line per row. These ask for token i of the next block's inputs
    // and of the rows that Finish will write; the loops over the states do, spread over their time, because a
    // burst would wait for the few lines that may be under way at once.
    HWY_INLINE void PrefetchInputs(int64_t i) const noexcept {
        const int64_t next = std::min(next_t + i, in.u.shape[0] - 1);
        hwy::Prefetch(in.u.row(next) + next_c);
        hwy::Prefetch(in.delta.row(next) + next_c);
        hwy::Prefetch(grad_y.row(next) + next_c);
        if (in.z) hwy::Prefetch(in.z.row(next) + next_c);
    }
    HWY_INLINE void PrefetchGradients(int64_t i) const noexcept {
        if (grad.u) hwy::Prefetch(grad.u.row(t + i) + c);
        if (grad.delta) hwy::Prefetch(grad.delta.row(t + i) + c);
        if (grad.z) hwy::Prefetch(grad.z.row(t + i) + c);
    }

    void Prepare() noexcept {
        const ScanTag d;
        const ScanVec bias = LoadChannels(in.delta_bias, c, lanes), skip = LoadChannels(in.D, c, lanes);
        const ScanVec one = hn::Set(d, 1.0f);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = i * kLanes;
            PrefetchGradients(i);
            ScanVec dt = hn::Add(Load(d, in.delta.row(t + i) + c, lanes), bias), slope = hn::Set(d, 1.0f);
            if (in.delta_softplus) dt = SoftplusWithSlope(dt, slope);
            const ScanVec u = Load(d, in.u.row(t + i) + c, lanes);
            ScanVec g = Load(d, grad_y.row(t + i) + c, lanes);
            if (in.z) {
                // silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
                const ScanVec z = Load(d, in.z.row(t + i) + c, lanes), gate = Sigmoid(d, z);
                const ScanVec gate_slope = hn::Mul(gate, hn::MulAdd(z, hn::Sub(one, gate), one));
                hn::Store(hn::Mul(g, gate_slope), d, memory.gz + at);
                g = hn::Mul(g, hn::Mul(z, gate));
            }
            hn::Store(u, d, memory.u + at);
            hn::Store(slope, d, memory.slope + at);
            hn::Store(hn::Mul(dt, u), d, memory.x + at);
            hn::Store(hn::Mul(dt, hn::Set(d, kLog2e)), d, memory.dt + at);
            hn::Store(g, d, memory.g + at);
            hn::Store(hn::Mul(skip, u), d, memory.y + at);
            hn::Store(hn::Zero(d), d, memory.s + at);
            hn::Store(hn::Zero(d), d, memory.e + at);
        }
    }

    // The states of kCount state indices from j on, again; `state` are rows [d n] of those entering the
    // chunk.
    template <size_t kCount>
    HWY_INLINE void Recompute(int64_t j, const float* state) noexcept {
        const ScanTag d;
        const int64_t n = in.A.shape[1], channels = std::min(kLanes, in.A.shape[0] - c);
        std::fill_n(memory.h, kCount * kLanes, 0.0f);
        for (int64_t i = 0; i < channels; ++i) {
            for (size_t k = 0; k < kCount; ++k) memory.h[k * kLanes + i] = state[i * n + j + k];
        }
        ScanVec h[kCount];
        Unroll<kCount>([&](auto k) HWY_ATTR
                       __attribute__((always_inline)) { h[k] = hn::Load(d, memory.h + k * kLanes); });
        const float *B = in.B.row(t) + j, *C = in.C.row(t) + j;
        const float* A = memory.A + block * n * kLanes + j * kLanes;
        for (int64_t i = 0; i < count; ++i, B += in.B.stride, C += in.C.stride) {
            float *A_bar = memory.A_bar + i * kCount * kLanes, *after = memory.h + (i + 1) * kCount * kLanes;
            if (j == 0) PrefetchInputs(i);
            const ScanVec dt = hn::Load(d, memory.dt + i * kLanes), x = hn::Load(d, memory.x + i * kLanes);
            ScanVec y[2] = {hn::Load(d, memory.y + i * kLanes), hn::Zero(d)};
            Unroll<kCount>([&](auto k) HWY_ATTR __attribute__((always_inline)) {
                const ScanVec decay = Exp2Fast(d, hn::Mul(dt, hn::Load(d, A + k * kLanes)));
                h[k] = hn::MulAdd(decay, h[k], hn::Mul(x, hn::Set(d, B[k])));
                hn::Store(decay, d, A_bar + k * kLanes);
                hn::Store(h[k], d, after + k * kLanes);
                y[k % 2] = hn::MulAdd(h[k], hn::Set(d, C[k]), y[k % 2]);
            });
            hn::Store(hn::Add(y[0], y[1]), d, memory.y + i * kLanes);
        }
    }

    // From the last token to the first. The group's first block starts the sums over channels.
    template <size_t kCount, bool kFirst>
    HWY_INLINE void Reverse(int64_t j) noexcept {
        const ScanTag d;
        const int64_t n = in.A.shape[1], own = (block * n + j) * kLanes;
        const float* A = memory.A + own;
        ScanVec gh[kCount], gA[kCount], h[kCount];
        Unroll<kCount>([&](auto k) HWY_ATTR __attribute__((always_inline)) {
            gh[k] = hn::Load(d, memory.gh + own + k * kLanes);
            gA[k] = hn::Load(d, memory.gA + own + k * kLanes);
            h[k] = hn::Load(d, memory.h + (count * kCount + k) * kLanes);
        });
        for (int64_t i = count - 1; i >= 0; --i) {
            const float *B = in.B.row(t + i) + j, *C = in.C.row(t + i) + j;
            const float *A_bar = memory.A_bar + i * kCount * kLanes, *before = memory.h + i * kCount * kLanes;
            float *gB = memory.gB + (i * n + j) * kLanes, *gC = memory.gC + (i * n + j) * kLanes;
            const ScanVec dt = hn::Load(d, memory.dt + i * kLanes), x = hn::Load(d, memory.x + i * kLanes),
                          g = hn::Load(d, memory.g + i * kLanes);
            ScanVec s = hn::Load(d, memory.s + i * kLanes), e = hn::Load(d, memory.e + i * kLanes);
            Unroll<kCount>([&](auto k) HWY_ATTR __attribute__((always_inline)) {
                const ScanVec zero = hn::Zero(d);
                gh[k] = hn::MulAdd(g, hn::Set(d, C[k]), gh[k]);
                const ScanVec gC_old = kFirst ? zero : hn::Load(d, gC + k * kLanes);
                const ScanVec gB_old = kFirst ? zero : hn::Load(d, gB + k * kLanes);
                hn::Store(hn::MulAdd(g, h[k], gC_old), d, gC + k * kLanes);
                hn::Store(hn::MulAdd(gh[k], x, gB_old), d, gB + k * kLanes);
                s = hn::MulAdd(gh[k], hn::Set(d, B[k]), s);
                gh[k] = hn::Mul(gh[k], hn::Load(d, A_bar + k * kLanes));
                h[k] = hn::Load(d, before + k * kLanes);
                const ScanVec through = hn::Mul(gh[k], h[k]);
                gA[k] = hn::MulAdd(dt, through, gA[k]);
                e = hn::MulAdd(through, hn::Load(d, A + k * kLanes), e);
            });
            hn::Store(s, d, memory.s + i * kLanes);
            hn::Store(e, d, memory.e + i * kLanes);
        }
        Unroll<kCount>([&](auto k) HWY_ATTR __attribute__((always_inline)) {
            hn::Store(gh[k], d, memory.gh + own + k * kLanes);
            hn::Store(gA[k], d, memory.gA + own + k * kLanes);
        });
    }

    // The gradients that have a row per token. Reads nothing but scratch: the inputs have left L1 by now.
    void Finish() noexcept {
        const ScanTag d;
        const ScanVec skip = LoadChannels(in.D, c, lanes), ln2 = hn::Set(d, kLn2);
        ScanVec gD = hn::Load(d, memory.gD + block * kLanes);
        ScanVec gbias = hn::Load(d, memory.gbias + block * kLanes);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = i * kLanes;
            const ScanVec u = hn::Load(d, memory.u + at), g = hn::Load(d, memory.g + at);
            const ScanVec s = hn::Load(d, memory.s + at);
            const ScanVec dt = hn::Mul(hn::Load(d, memory.dt + at), ln2);
            const ScanVec gdelta =
                hn::Mul(hn::MulAdd(u, s, hn::Load(d, memory.e + at)), hn::Load(d, memory.slope + at));
            gD = hn::MulAdd(g, u, gD);
            gbias = hn::Add(gbias, gdelta);
            if (grad.u)
                AddOrSet(grad.set.u, grad.u.row(t + i) + c, hn::MulAdd(skip, g, hn::Mul(dt, s)), lanes);
            if (grad.delta) AddOrSet(grad.set.delta, grad.delta.row(t + i) + c, gdelta, lanes);
            if (grad.z) {
                const ScanVec gz = hn::Mul(hn::Load(d, memory.gz + at), hn::Load(d, memory.y + at));
                AddOrSet(grad.set.z, grad.z.row(t + i) + c, gz, lanes);
            }
        }
        hn::Store(gD, d, memory.gD + block * kLanes);
        hn::Store(gbias, d, memory.gbias + block * kLanes);
    }

    void Run(const float* state) noexcept {
        Prepare();
        ForEachStatePiece<kBackPiece>(in.A.shape[1], [&](int64_t j, auto size) HWY_ATTR {
            constexpr size_t kCount = decltype(size)::value;
            Recompute<kCount>(j, state);
            if (block == 0) {
                Reverse<kCount, true>(j);
            } else {
                Reverse<kCount, false>(j);
            }
        });
        Finish();
    }
};

// Everything of one call.
struct Backward {
    const SelectiveScanInputs<float>& in;
    View<const float, 3> chunk_states;
    View<const float, 2> grad_y;
    View<const float, 3> grad_final_state;
    const SelectiveScanGradients<float>& grad;
    int64_t chunk;
    std::vector<int64_t> first_chunk;  // [s+1]
    int64_t q;                         // tokens of the longest chunk
    float *partial_B, *partial_C;      // [groups t n]

    int64_t d() const { return in.u.shape[1]; }
    int64_t n() const { return in.A.shape[1]; }
    int64_t t() const { return in.u.shape[0]; }

    // Sums the lanes of the group's gB, gC over a chunk into its partial sums.
    void SumLanes(const GroupMemory& memory, int64_t group, int64_t begin, int64_t count) noexcept {
        float* B = partial_B + (group * t() + begin) * n();
        float* C = partial_C + (group * t() + begin) * n();
        SumEach(memory.gB, count * n(), B);
        SumEach(memory.gC, count * n(), C);
    }
    // sums[i] = sum of the lanes of vector i
    static void SumEach(const float* vectors, int64_t count, float* sums) noexcept {
        const ScanTag d;
        auto v = [&](int64_t i) HWY_ATTR { return hn::Load(d, vectors + i * kLanes); };
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            StoreSums(d, v(i), v(i + 1), v(i + 2), v(i + 3), sums + i);
        }
        for (; i < count; ++i) sums[i] = SumToFloat(d, v(i));
    }

    void RunSequence(const GroupMemory& memory, int64_t group, int64_t blocks, int64_t s) noexcept {
        const int64_t c0 = group * kGroup, rows = n() * kLanes;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t c = c0 + b * kLanes;
            LoadBlock(grad_final_state ? grad_final_state.row(s) + c * n() : nullptr, n(), d() - c, n(),
                      memory.gh + b * rows);
        }
        for (int64_t index = first_chunk[s + 1] - 1; index >= first_chunk[s]; --index) {
            const int64_t begin = in.cu_seqlens[s] + (index - first_chunk[s]) * chunk;
            const int64_t count = std::min(chunk, in.cu_seqlens[s + 1] - begin);
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t c = c0 + b * kLanes;
                const bool last = b + 1 == blocks;
                const int64_t next_t = last ? std::max<int64_t>(begin - chunk, 0) : begin;
                const int64_t next_c = last ? c0 : c + kLanes;
                WithLanes(c, d(), [&](auto lanes) {
                    ChunkBackward<decltype(lanes)> work{in,    grad_y, grad,   memory, b,    begin,
                                                        count, c,      next_t, next_c, lanes};
                    work.Run(chunk_states.row(index) + c * n());
                });
            }
            SumLanes(memory, group, begin, count);
        }
        for (int64_t b = 0; b < blocks && grad.initial_state; ++b) {
            const int64_t c = c0 + b * kLanes;
            AddBlock(memory.gh + b * rows, 1.0f, c, grad.initial_state.row(s) + c * n(), n());
        }
    }

    // rows [d n] from channel c on += scale * block
    void AddBlock(const float* block, float scale, int64_t c, float* rows, int64_t stride) noexcept {
        for (int64_t i = 0; i < std::min(kLanes, d() - c); ++i) {
            for (int64_t j = 0; j < n(); ++j) rows[i * stride + j] += scale * block[j * kLanes + i];
        }
    }

    void RunGroup(const GroupMemory& memory, int64_t group) noexcept {
        const int64_t c0 = group * kGroup, rows = n() * kLanes;
        const int64_t blocks = (std::min(kGroup, d() - c0) + kLanes - 1) / kLanes;
        std::fill_n(memory.gA, n() * kGroup, 0.0f);
        std::fill_n(memory.gD, kGroup, 0.0f);
        std::fill_n(memory.gbias, kGroup, 0.0f);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t c = c0 + b * kLanes;
            LoadBlock(in.A.row(c), in.A.stride, d() - c, n(), memory.A + b * rows);
        }
        for (size_t s = 0; s + 1 < in.cu_seqlens.size(); ++s) {
            RunSequence(memory, group, blocks, static_cast<int64_t>(s));
        }
        for (int64_t b = 0; b < blocks && grad.A; ++b) {
            const int64_t c = c0 + b * kLanes;
            AddBlock(memory.gA + b * rows, kLn2, c, grad.A.row(c), grad.A.stride);
        }
        for (int64_t i = 0; i < std::min(kGroup, d() - c0); ++i) {
            if (grad.D) grad.D.data[c0 + i] += memory.gD[i];
            if (grad.delta_bias) grad.delta_bias.data[c0 + i] += memory.gbias[i];
        }
    }

    // rows [t n] += (or =) the partial sums of the groups, in their order
    void AddPartials(const Exec& ex, const float* partial, int64_t groups, bool set, View<float, 2> rows) {
        if (!rows) return;
        parallel_for(ex, t(), 256, [&](int64_t begin, int64_t end) {
            const ScanTag tag;
            for (int64_t i = begin; i < end; ++i) {
                ForEachVector(tag, n(), [&](int64_t j, auto lanes) HWY_ATTR {
                    ScanVec sum = hn::Zero(tag);
                    for (int64_t g = 0; g < groups; ++g) {
                        sum = hn::Add(sum, Load(tag, partial + (g * t() + i) * n() + j, lanes));
                    }
                    AddOrSet(set, rows.row(i) + j, sum, lanes);
                });
            }
        });
    }

    void Run(const Exec& ex) {
        const int64_t groups = (d() + kGroup - 1) / kGroup;
        parallel_for(ex, groups, 1, [&](int64_t begin, int64_t end) {
            Scratch<float> scratch(ex, GroupMemory::size(n(), q));
            const GroupMemory memory(scratch.data(), n(), q);
            for (int64_t group = begin; group < end; ++group) RunGroup(memory, group);
        });
        AddPartials(ex, partial_B, groups, grad.set.B, grad.B);
        AddPartials(ex, partial_C, groups, grad.set.C, grad.C);
    }
};

void Gradients(const Exec& ex, const SelectiveScanInputs<float>& in, View<const float, 3> chunk_states,
               View<const float, 2> grad_y, View<const float, 3> grad_final_state,
               const SelectiveScanGradients<float>& grad, int64_t chunk) {
    int64_t longest = 0;
    for (size_t i = 1; i < in.cu_seqlens.size(); ++i) {
        longest = std::max(longest, in.cu_seqlens[i] - in.cu_seqlens[i - 1]);
    }
    const int64_t groups = (in.u.shape[1] + kGroup - 1) / kGroup;
    const int64_t size = groups * in.u.shape[0] * in.A.shape[1];
    Scratch<float> partials(ex, 2 * size);
    Backward backward{in,
                      chunk_states,
                      grad_y,
                      grad_final_state,
                      grad,
                      chunk,
                      selective_scan_first_chunks(in.cu_seqlens, chunk),
                      std::min(chunk, longest),
                      partials.data(),
                      partials.data() + size};
    backward.Run(ex);
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(Gradients);

namespace cpu {

template <>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<float>& in,
                             View<const float, 3> chunk_states, View<const float, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<float>& grad,
                             const SelectiveScanOptions& options) {
    HWY_DYNAMIC_DISPATCH(Gradients)(ex, in, chunk_states, grad_y, grad_final_state, grad, options.chunk);
}
}  // namespace cpu
}  // namespace ssm
#endif  // HWY_ONCE
