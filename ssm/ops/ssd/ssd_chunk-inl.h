// What forward and backward share inside one chunk: conversion to f32, packing, transposition, time steps
// and decays. Included once per instruction set. Private.
#if defined(SSM_OPS_SSD_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_OPS_SSD_CHUNK_INL_H_
#undef SSM_OPS_SSD_CHUNK_INL_H_
#else
#define SSM_OPS_SSD_CHUNK_INL_H_
#endif

#include "ssm/core/dtype.h"
#include "ssm/core/parallel.h"
#include "ssm/core/simd_math-inl.h"
#include "ssm/ops/ssd/ssd.h"
#include "ssm/ops/ssd/ssd_gemm-inl.h"
#include "ssm/ops/ssd/ssd_impl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

HWY_INLINE int64_t float_lanes() { return static_cast<int64_t>(hn::Lanes(FloatTag())); }
HWY_INLINE int64_t padded(int64_t count) {
    return (count + float_lanes() - 1) / float_lanes() * float_lanes();
}

// Rows of scratch matrices: whole vectors, plus 16 so that a column never falls on few cache sets.
HWY_INLINE int64_t scratch_stride(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

HWY_INLINE FloatVec load_floats(const float* p) { return hn::LoadU(FloatTag(), p); }
HWY_INLINE FloatVec load_floats(const bf16* p) {
    const FloatTag d;
    const hn::RebindToUnsigned<FloatTag> du;
    const hn::Rebind<uint16_t, FloatTag> d16;
    const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}

HWY_INLINE void store_floats(FloatVec v, float* p) { hn::StoreU(v, FloatTag(), p); }
// Round to nearest, ties to even; NaN stays NaN: as bf16(float).
HWY_INLINE void store_floats(FloatVec v, bf16* p) {
    const hn::RebindToUnsigned<FloatTag> du;
    const hn::RebindToSigned<FloatTag> di;
    const hn::Rebind<uint16_t, FloatTag> d16;
    const auto bits = hn::BitCast(du, v);
    const auto high = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(high, hn::Set(du, 1u));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu))));
    const auto quiet = hn::Or(high, hn::Set(du, 0x40u));
    const auto result = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, result)), d16, reinterpret_cast<uint16_t*>(p));
}

// row[0..count) = src, then zeros up to whole vectors.
template <class T>
HWY_INLINE void pack_row(const T* HWY_RESTRICT src, int64_t count, float* HWY_RESTRICT row) {
    const int64_t lanes = float_lanes();
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store_floats(load_floats(src + i), row + i);
    for (; i < count; ++i) row[i] = static_cast<float>(src[i]);
    for (const int64_t end = padded(count); i < end; ++i) row[i] = 0.0f;
}

// to[i, :] += from[i, :], `count` elements.
HWY_INLINE void add_row(const float* HWY_RESTRICT from, int64_t count, float* HWY_RESTRICT to) {
    const int64_t lanes = float_lanes();
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        store_floats(hn::Add(load_floats(from + i), load_floats(to + i)), to + i);
    for (; i < count; ++i) to[i] += from[i];
}

HWY_INLINE float dot(const float* a, const float* b, int64_t padded_count) {
    const FloatTag d;
    FloatVec sum = hn::Zero(d);
    for (int64_t i = 0; i < padded_count; i += float_lanes()) {
        sum = hn::MulAdd(load_floats(a + i), load_floats(b + i), sum);
    }
    return hn::GetLane(hn::SumOfLanes(d, sum));
}

// to[j, i] = from[i, j] of one 4 x 4 block.
HWY_INLINE void transpose_4x4(const float* HWY_RESTRICT from, int64_t from_stride, float* HWY_RESTRICT to,
                              int64_t to_stride) {
#if HWY_TARGET == HWY_SCALAR  // has no shuffles
    for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
#else
    const hn::FixedTag<float, 4> d;
    const hn::FixedTag<double, 2> dd;
    const auto r0 = hn::LoadU(d, from), r1 = hn::LoadU(d, from + from_stride);
    const auto r2 = hn::LoadU(d, from + 2 * from_stride), r3 = hn::LoadU(d, from + 3 * from_stride);
    const auto low01 = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));
    const auto low23 = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
    const auto high01 = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
    const auto high23 = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, low01, low23)), d, to);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, low01, low23)), d, to + to_stride);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, high01, high23)), d, to + 2 * to_stride);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, high01, high23)), d, to + 3 * to_stride);
#endif
}

// to[j, i] = from[i, j] for i < rows, j < columns.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, int64_t from_stride, int64_t rows, int64_t columns,
                          float* HWY_RESTRICT to, int64_t to_stride) {
    const int64_t rows4 = rows / 4 * 4, columns4 = columns / 4 * 4;
    for (int64_t i = 0; i < rows4; i += 4) {
        for (int64_t j = 0; j < columns4; j += 4) {
            transpose_4x4(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i < rows4 ? columns4 : 0; j < columns; ++j) {
            to[j * to_stride + i] = from[i * from_stride + j];
        }
    }
}

// Zeros the columns from `columns` to the next whole vector.
HWY_INLINE void zero_padding(float* matrix, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = columns; j < padded(columns); ++j) matrix[i * stride + j] = 0.0f;
    }
}

// e^x for x <= 0; 0 below -80.
HWY_INLINE FloatVec decay(FloatVec x) {
    const FloatTag d;
    return hn::IfThenElseZero(hn::Gt(x, hn::Set(d, -80.0f)), Exp(d, x));
}
HWY_INLINE void decay_in_place(float* x, int64_t count) {  // writes whole vectors
    for (int64_t i = 0; i < count; i += float_lanes()) store_floats(decay(load_floats(x + i)), x + i);
}

// Time steps of one head in one chunk of q tokens; l = cumsum(dt A) inside the chunk, summed in f64 so that
// differences of large sums keep their digits. Every array holds q rounded up to whole vectors.
struct TimeSteps {
    double* l;           // [q]
    float* raw;          // [q] dt before softplus, with the bias
    float* dt;           // [q]
    float* from_start;   // [q] exp(l_i)
    float* to_end;       // [q] exp(l_q - l_i)
    float* local;        // [q] l_i - l_(b - 1), b the start of the decay block of i
    float* local_decay;  // [q] exp of it
    float* weight;       // [q] scratch of for_each_decay
    float total = 1;     // exp(l_q)
};

inline constexpr int64_t kDecayBlock = 16;

// Floats that TimeSteps needs for chunks of up to q tokens.
HWY_INLINE int64_t time_steps_floats(int64_t q) { return 9 * scratch_stride(q); }
HWY_INLINE TimeSteps place_time_steps(float* memory, int64_t q) {
    const int64_t size = scratch_stride(q);
    TimeSteps s{};
    s.l = reinterpret_cast<double*>(memory);
    float** const arrays[] = {&s.raw, &s.dt, &s.from_start, &s.to_end, &s.local, &s.local_decay, &s.weight};
    memory += 2 * size;
    for (float** array : arrays) {
        *array = memory;
        memory += size;
    }
    return s;
}

// dt = clamp(softplus(raw)) of one vector.
template <class T>
HWY_INLINE FloatVec time_step(const SsdInputs<T>& in, FloatVec raw) {
    const FloatTag d;
    if (!in.dt_softplus) return raw;
    return hn::Min(hn::Max(Softplus(d, raw), hn::Set(d, in.dt_min)), hn::Set(d, in.dt_max));
}

template <class T>
HWY_INLINE void load_time_steps(const SsdInputs<T>& in, const ssd_detail::Chunk& chunk, int64_t head,
                                TimeSteps& s) {
    const int64_t q = chunk.length, q_padded = padded(q);
    const float bias = in.dt_bias ? in.dt_bias.data[head * in.dt_bias.stride] : 0.0f;
    const float a = in.A.data[head * in.A.stride];
    for (int64_t i = 0; i < q; ++i) s.raw[i] = static_cast<float>(in.dt.row(chunk.begin + i)[head]) + bias;
    for (int64_t i = q; i < q_padded; ++i) s.raw[i] = 0.0f;
    for (int64_t i = 0; i < q_padded; i += float_lanes()) {
        store_floats(time_step(in, load_floats(s.raw + i)), s.dt + i);
    }
    double sum = 0, block_start = 0;
    for (int64_t i = 0; i < q; ++i) {
        if (i % kDecayBlock == 0) block_start = sum;
        sum += static_cast<double>(s.dt[i] * a);
        s.l[i] = sum;
        s.local[i] = static_cast<float>(sum - block_start);
    }
    for (int64_t i = 0; i < q; ++i) {
        s.from_start[i] = static_cast<float>(s.l[i]);
        s.to_end[i] = static_cast<float>(sum - s.l[i]);
    }
    for (int64_t i = q; i < q_padded; ++i) s.local[i] = s.from_start[i] = s.to_end[i] = 0.0f;
    std::copy(s.local, s.local + q_padded, s.local_decay);
    decay_in_place(s.local_decay, q);
    decay_in_place(s.from_start, q);
    decay_in_place(s.to_end, q);
    s.total = s.from_start[q - 1];
}

// Calls op(i, j, L), then end_row(i), for the vectors of the lower triangle of L_ij = exp(l_i - l_j), and
// with zeros up to the end of each tile of rows. Left of the decay block of i, L = exp(l_i - l_b) exp(l_b -
// l_j): one product instead of one exp, and no difference of large sums.
template <class Op, class EndRow>
HWY_INLINE void for_each_decay(const TimeSteps& s, int64_t q, const Op& op, const EndRow& end_row) {
    const FloatTag d;
    const int64_t lanes = float_lanes();
    for (int64_t start = 0; start < q; start += kDecayBlock) {
        const double before = start > 0 ? s.l[start - 1] : 0.0;
        for (int64_t j = 0; j < start; ++j) s.weight[j] = static_cast<float>(before - s.l[j]);
        decay_in_place(s.weight, start);
        for (int64_t i = start; i < std::min(q, start + kDecayBlock); ++i) {
            const FloatVec own = hn::Set(d, s.local_decay[i]);
            int64_t j = 0;
            for (; j < start; j += lanes) op(i, j, hn::Mul(own, load_floats(s.weight + j)));
            for (; j <= i; j += lanes) {
                const auto keep = hn::FirstN(d, static_cast<size_t>(i + 1 - j));
                const FloatVec difference = hn::Sub(hn::Set(d, s.local[i]), load_floats(s.local + j));
                op(i, j, decay(hn::IfThenElse(keep, difference, hn::Set(d, -1e30f))));
            }
            for (; j < tile_end(i, q); j += lanes) op(i, j, hn::Zero(d));
            end_row(i);
        }
    }
}

// What the heads of a group share in one chunk. Strides: scratch_stride of n and of q.
struct GroupChunk {
    float* C;   // [q n]
    float* B;   // [q n]
    float* Bt;  // [n q]
    float* G;   // [q q] lower triangle of C B^T
};

HWY_INLINE int64_t group_chunk_floats(int64_t q, int64_t n) {
    return 2 * q * scratch_stride(n) + (n + q) * scratch_stride(q);
}
HWY_INLINE GroupChunk place_group_chunk(float* memory, int64_t q, int64_t n) {
    GroupChunk s{};
    s.C = memory;
    s.B = s.C + q * scratch_stride(n);
    s.Bt = s.B + q * scratch_stride(n);
    s.G = s.Bt + n * scratch_stride(q);
    return s;
}

template <class T>
HWY_INLINE void fill_group_chunk(const SsdInputs<T>& in, const ssd_detail::Chunk& chunk, int64_t group,
                                 int64_t stride_q, const GroupChunk& s) {
    const int64_t n = in.B.shape[2], stride_n = scratch_stride(n), q = chunk.length;
    for (int64_t i = 0; i < q; ++i) {
        pack_row(in.B.row(chunk.begin + i) + group * n, n, s.B + i * stride_n);
        pack_row(in.C.row(chunk.begin + i) + group * n, n, s.C + i * stride_n);
    }
    transpose(s.B, stride_n, q, n, s.Bt, stride_q);
    zero_padding(s.Bt, stride_q, n, q);
    multiply({.a = s.C,
              .a_row = stride_n,
              .a_k = 1,
              .panel = s.Bt,
              .panel_stride = stride_q,
              .out = s.G,
              .out_stride = stride_q,
              .rows = q,
              .columns = q,
              .depth = n},
             Triangle::out_lower);
}

// X = dt x, and X scaled by exp(l_q - l_j) for the state leaving the chunk. Strides: scratch_stride(p).
template <class T>
HWY_INLINE void pack_x(const SsdInputs<T>& in, const ssd_detail::Chunk& chunk, int64_t head,
                       const TimeSteps& s, float* HWY_RESTRICT X, float* HWY_RESTRICT X_to_end) {
    const FloatTag d;
    const int64_t p = in.x.shape[2], stride = scratch_stride(p), p_padded = padded(p);
    for (int64_t i = 0; i < chunk.length; ++i) {
        float* const row = X + i * stride;
        pack_row(in.x.row(chunk.begin + i) + head * p, p, row);
        const FloatVec dt = hn::Set(d, s.dt[i]), to_end = hn::Set(d, s.to_end[i]);
        for (int64_t j = 0; j < p_padded; j += float_lanes()) {
            const FloatVec v = hn::Mul(load_floats(row + j), dt);
            store_floats(v, row + j);
            store_floats(hn::Mul(v, to_end), X_to_end + i * stride + j);
        }
    }
}

// Fills the GroupChunks of the chunks first .. last, all groups, at `memory`. q: the longest chunk.
template <class T>
void fill_group_chunks(const Exec& ex, const SsdInputs<T>& in, const ssd_detail::ChunkList& list,
                       int64_t first, int64_t last, float* memory) {
    const int64_t g = in.B.shape[1], n = in.B.shape[2], q = list.longest;
    parallel_for(ex, (last - first) * g, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
        for (int64_t i = begin; i < end; ++i) {
            fill_group_chunk(in, list.chunks[first + i / g], i % g, scratch_stride(q),
                             place_group_chunk(memory + i * group_chunk_floats(q, n), q, n));
        }
    });
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include-once per target
