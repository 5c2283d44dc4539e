// A chunk of SSD in bf16: the same products as in f32 with both operands rounded to bf16 and sums in f32, as
// in the authors' kernels, at twice the rate. For processors that multiply pairs of bf16 (AVX512_BF16).
// Included once per instruction set. Private.
//
// x, B and C are bf16 already; rounded are M, the state that C reads and the weighted x that the state takes
// in. dt is folded into M, so that x enters exactly. The state itself stays f32 from chunk to chunk.
#if defined(SSM_OPS_SSD_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_OPS_SSD_PAIRS_INL_H_
#undef SSM_OPS_SSD_PAIRS_INL_H_
#else
#define SSM_OPS_SSD_PAIRS_INL_H_
#endif

#include <cstring>

#include "ssm/ops/ssd/ssd_chunk-inl.h"

#if SSM_SSD_PAIRS
HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {

inline bool multiplies_pairs() {
    static const bool yes = __builtin_cpu_supports("avx512bf16") != 0;
    return yes;
}

HWY_INLINE void store_pairs(PairVec v, uint32_t* p) { hn::StoreU(v, PairTag(), p); }

// Words (even[i], odd[i]), rounded to nearest even.
HWY_INLINE PairVec round_to_pairs(FloatVec even, FloatVec odd) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both;  // the 16 of even, then the 16 of odd
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(odd.raw), "v"(even.raw));
    return PairVec{_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both)};
}
HWY_INLINE void store_rounded(FloatVec v, bf16* p) {
    __m256i out;
    asm("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(v.raw));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
}

// Words (even[i], odd[i]) of two rows; odd may be absent.
HWY_INLINE void interleave_rows(const bf16* even, const bf16* odd, int64_t count, uint32_t* out) {
    const PairTag d;
    const hn::Rebind<uint16_t, PairTag> d16;
    const auto bits = [](const bf16* p) { return reinterpret_cast<const uint16_t*>(p); };
    int64_t i = 0;
    for (; i + float_lanes() <= count; i += float_lanes()) {
        const PairVec low = hn::PromoteTo(d, hn::LoadU(d16, bits(even + i)));
        const PairVec high = odd == nullptr ? hn::Zero(d) : hn::PromoteTo(d, hn::LoadU(d16, bits(odd + i)));
        store_pairs(hn::Or(low, hn::ShiftLeft<16>(high)), out + i);
    }
    for (; i < count; ++i) {
        out[i] = bits(even)[i] | (odd == nullptr ? 0u : static_cast<uint32_t>(bits(odd)[i]) << 16);
    }
    for (const int64_t end = padded(count); i < end; ++i) out[i] = 0;
}

HWY_INLINE int64_t pairs_in(int64_t count) { return (count + 1) / 2; }

// What the heads of a group share in one chunk. Strides: scratch_stride of the second extent.
struct PairGroup {
    uint32_t* C;       // [q n/2]  pairs along n
    uint32_t* B;       // [q n/2]
    uint32_t* Bt;      // [n/2 q]
    uint32_t* B_time;  // [q/2 n]  pairs along time
    float* G;          // [q q]
};

// What a worker needs for a head in one chunk.
struct PairScratch {
    TimeSteps steps;
    uint32_t* X;         // [q/2 p]  pairs along time
    uint32_t* X_to_end;  // [q/2 p]
    uint32_t* M;         // [q q/2]
    uint32_t* S;         // [n/2 p]  the state that enters
    float* Y;            // [q p]
    float* St;           // [n p]
};

// The engine of Forward (ssd_cpu.cpp) in bf16.
struct PairEngine {
    using Scratch = PairScratch;

    static HWY_INLINE void store(FloatVec v, bf16* p) { store_rounded(v, p); }
    // Products much smaller than a tile have nothing to gain.
    static bool suits(int64_t p, int64_t n) { return p >= 16 && n >= 16 && multiplies_pairs(); }

    static int64_t group_floats(int64_t q, int64_t n) {
        return 2 * q * scratch_stride(pairs_in(n)) + (pairs_in(n) + q) * scratch_stride(q) +
               pairs_in(q) * scratch_stride(n);
    }
    static PairGroup place_group(float* memory, int64_t q, int64_t n) {
        PairGroup s{};
        s.C = reinterpret_cast<uint32_t*>(memory);
        s.B = s.C + q * scratch_stride(pairs_in(n));
        s.Bt = s.B + q * scratch_stride(pairs_in(n));
        s.B_time = s.Bt + pairs_in(n) * scratch_stride(q);
        s.G = reinterpret_cast<float*>(s.B_time + pairs_in(q) * scratch_stride(n));
        return s;
    }
    static int64_t scratch_floats(int64_t q, int64_t p, int64_t n) {
        return time_steps_floats(q) + (2 * pairs_in(q) + pairs_in(n) + q + n) * scratch_stride(p) +
               q * scratch_stride(pairs_in(q));
    }
    static PairScratch place(float* memory, int64_t q, int64_t p, int64_t n) {
        const int64_t stride = scratch_stride(p);
        PairScratch s{};
        s.steps = place_time_steps(memory, q);
        s.X = reinterpret_cast<uint32_t*>(memory + time_steps_floats(q));
        s.X_to_end = s.X + pairs_in(q) * stride;
        s.S = s.X_to_end + pairs_in(q) * stride;
        s.M = s.S + pairs_in(n) * stride;
        s.Y = reinterpret_cast<float*>(s.M + q * scratch_stride(pairs_in(q)));
        s.St = s.Y + q * stride;
        return s;
    }
    static void fill(const SsdInputs<bf16>& in, const ssd_detail::Chunk& chunk, int64_t group, int64_t q_max,
                     float* memory);
    static void chunk(const SsdInputs<bf16>& in, const ssd_detail::Chunk& chunk, int64_t head, int64_t q_max,
                      float* group, PairScratch& s, bool zero_state, bool update_state);
};

inline void PairEngine::fill(const SsdInputs<bf16>& in, const ssd_detail::Chunk& chunk, int64_t group,
                             int64_t q_max, float* memory) {
    const int64_t n = in.B.shape[2], q = chunk.length, words = pairs_in(n);
    const int64_t stride_n = scratch_stride(words), stride_q = scratch_stride(q_max);
    const PairGroup s = place_group(memory, q_max, n);
    const auto copy = [&](const bf16* from, uint32_t* to) {
        if (n % 2 != 0) to[words - 1] = 0;
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(bf16));
    };
    for (int64_t i = 0; i < q; ++i) {
        const bf16* const B = in.B.row(chunk.begin + i) + group * n;
        copy(B, s.B + i * stride_n);
        copy(in.C.row(chunk.begin + i) + group * n, s.C + i * stride_n);
        if (i % 2 != 0) continue;
        const bf16* const next = i + 1 < q ? in.B.row(chunk.begin + i + 1) + group * n : nullptr;
        interleave_rows(B, next, n, s.B_time + i / 2 * scratch_stride(n));
    }
    // Words are moved as floats: nothing computes with them.
    float* const Bt = reinterpret_cast<float*>(s.Bt);
    transpose(reinterpret_cast<const float*>(s.B), stride_n, q, words, Bt, stride_q);
    zero_padding(Bt, stride_q, words, q);
    multiply_pairs({.a = s.C,
                    .a_row = stride_n,
                    .a_k = 1,
                    .panel = s.Bt,
                    .panel_stride = stride_q,
                    .out = s.G,
                    .out_stride = stride_q,
                    .rows = q,
                    .columns = q,
                    .depth = words},
                   Triangle::out_lower);
}

// X: pairs of x. X_to_end: x scaled by dt exp(l_q - l_j).
HWY_INLINE void pack_x_pairs(const SsdInputs<bf16>& in, const ssd_detail::Chunk& chunk, int64_t head,
                             const PairScratch& s) {
    const FloatTag d;
    const int64_t p = in.x.shape[2], stride = scratch_stride(p), q = chunk.length;
    for (int64_t i = 0; i < q; i += 2) {
        const bf16* const even = in.x.row(chunk.begin + i) + head * p;
        const bf16* const odd = i + 1 < q ? in.x.row(chunk.begin + i + 1) + head * p : nullptr;
        uint32_t* const row = s.X + i / 2 * stride;
        uint32_t* const to_end = s.X_to_end + i / 2 * stride;
        interleave_rows(even, odd, p, row);
        const auto weight = [&](int64_t j) HWY_ATTR { return hn::Set(d, s.steps.dt[j] * s.steps.to_end[j]); };
        const FloatVec w0 = weight(i), w1 = odd == nullptr ? hn::Zero(d) : weight(i + 1);
        for (int64_t j = 0; j < padded(p); j += float_lanes()) {
            const PairVec v = hn::LoadU(PairTag(), row + j);
            const FloatVec x0 = hn::BitCast(d, hn::ShiftLeft<16>(v));
            const FloatVec x1 = hn::BitCast(d, hn::And(v, hn::Set(PairTag(), 0xffff0000u)));
            store_pairs(round_to_pairs(hn::Mul(x0, w0), hn::Mul(x1, w1)), to_end + j);
        }
    }
}

// M_ij = exp(l_i - l_j) G_ij dt_j.
HWY_INLINE void fill_M(const PairScratch& s, const float* G, int64_t stride_q, int64_t stride_m, int64_t q) {
    bf16* const M = reinterpret_cast<bf16*>(s.M);
    const float* const dt = s.steps.dt;
    for_each_decay(
        s.steps, q,
        [=](int64_t i, int64_t j, FloatVec L) HWY_ATTR {
            const FloatVec v = hn::Mul(hn::Mul(L, load_floats(dt + j)), load_floats(G + i * stride_q + j));
            store_rounded(v, M + i * 2 * stride_m + j);
        },
        [](int64_t) {});
}

HWY_INLINE void round_state(const PairScratch& s, int64_t n, int64_t p) {
    const int64_t stride = scratch_stride(p);
    for (int64_t i = 0; i < n; i += 2) {
        const float* const row = s.St + i * stride;
        for (int64_t j = 0; j < padded(p); j += float_lanes()) {
            const FloatVec odd = i + 1 < n ? load_floats(row + stride + j) : hn::Zero(FloatTag());
            store_pairs(round_to_pairs(load_floats(row + j), odd), s.S + i / 2 * stride + j);
        }
    }
}

inline void PairEngine::chunk(const SsdInputs<bf16>& in, const ssd_detail::Chunk& chunk, int64_t head,
                              int64_t q_max, float* group, PairScratch& s, bool zero_state,
                              bool update_state) {
    const int64_t p = in.x.shape[2], n = in.B.shape[2], q = chunk.length;
    const int64_t stride_p = scratch_stride(p), stride_m = scratch_stride(pairs_in(q_max));
    const PairGroup shared = place_group(group, q_max, n);
    load_time_steps(in, chunk, head, s.steps);
    pack_x_pairs(in, chunk, head, s);
    fill_M(s, shared.G, scratch_stride(q_max), stride_m, q);
    if (!zero_state) {
        round_state(s, n, p);
        multiply_pairs({.a = shared.C,
                        .a_row = scratch_stride(pairs_in(n)),
                        .a_k = 1,
                        .panel = s.S,
                        .panel_stride = stride_p,
                        .out = s.Y,
                        .out_stride = stride_p,
                        .rows = q,
                        .columns = p,
                        .depth = pairs_in(n)});
    }
    multiply_pairs({.a = s.M,
                    .a_row = stride_m,
                    .a_k = 1,
                    .panel = s.X,
                    .panel_stride = stride_p,
                    .out = s.Y,
                    .out_stride = stride_p,
                    .rows = q,
                    .columns = p,
                    .depth = pairs_in(q),
                    .beta = zero_state ? nullptr : s.steps.from_start,
                    .beta_stride = 1},
                   Triangle::lower);
    if (!update_state) return;
    multiply_pairs({.a = shared.B_time,
                    .a_row = 1,
                    .a_k = scratch_stride(n),
                    .panel = s.X_to_end,
                    .panel_stride = stride_p,
                    .out = s.St,
                    .out_stride = stride_p,
                    .rows = n,
                    .columns = p,
                    .depth = pairs_in(q),
                    .beta = zero_state ? nullptr : &s.steps.total});
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // SSM_SSD_PAIRS

#endif  // include-once per target
