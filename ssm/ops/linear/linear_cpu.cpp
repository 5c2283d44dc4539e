// Matrix-vector kernels for decoding, and the small loops around the matrix products.
#include <cstring>

#include "ssm/core/parallel.h"
#include "ssm/ops/linear/linear_impl.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/linear/linear_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ssm::linear_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;

// Weight rows per block: their loads share each load of x. Rows of x per block: they share each weight.
constexpr int kWeightRows = 4;
constexpr int kXRows = HWY_TARGET <= HWY_AVX3 || HWY_TARGET >= HWY_NEON ? 4 : 2;  // 32 registers or 16

HWY_INLINE VF FromBf16(DF d, hn::Vec<DU16> v) {
    const DU du;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, v)));
}

// Round to nearest even; NaN stays a quiet NaN.
HWY_INLINE hn::Vec<DU16> ToBf16(VF v) {
    const DU du;
    const VU u = hn::BitCast(du, v);
    const VU odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u));
    const VU rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fffu)));
    const VU quiet = hn::Or(u, hn::Set(du, 0x400000u));
    const VU bits = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
    return hn::TruncateTo(DU16(), hn::ShiftRight<16>(bits));
}

void ConvertRow(int64_t columns, const float* from, bf16* to) {
    const DF d;
    const DU16 d16;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    auto* out = reinterpret_cast<uint16_t*>(to);
    int64_t c = 0;
    for (; c + step <= columns; c += step) hn::StoreU(ToBf16(hn::LoadU(d, from + c)), d16, out + c);
    for (; c < columns; ++c) to[c] = bf16(from[c]);
}

void ConvertRow(int64_t columns, const bf16* from, float* to) {
    const DF d;
    const DU16 d16;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    const auto* in = reinterpret_cast<const uint16_t*>(from);
    int64_t c = 0;
    for (; c + step <= columns; c += step) hn::StoreU(FromBf16(d, hn::LoadU(d16, in + c)), d, to + c);
    for (; c < columns; ++c) to[c] = static_cast<float>(from[c]);
}

template <class T>
void ConvertRow(int64_t columns, const T* from, T* to) {
    std::copy(from, from + columns, to);
}

template <class From, class To>
void ConvertRows(const Exec& ex, int64_t rows, int64_t columns, const void* from, int64_t from_stride,
                 void* to, int64_t to_stride) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
    parallel_for(ex, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            ConvertRow(columns, static_cast<const From*>(from) + r * from_stride,
                       static_cast<To*>(to) + r * to_stride);
        }
    });
}

void ConvertAny(const Exec& ex, int64_t rows, int64_t columns, const Matrix& from, void* to, DType to_dtype,
                int64_t to_stride) {
    dispatch_activation(from.dtype, "linear", [&]<class From>() {
        dispatch_activation(to_dtype, "linear", [&]<class To>() {
            ConvertRows<From, To>(ex, rows, columns, from.data, from.stride, to, to_stride);
        });
    });
}

void AddColumnSums(const Exec& ex, int64_t rows, int64_t columns, const float* a, int64_t stride,
                   float* sum) {
    const DF d;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    parallel_for(ex, columns, 4 * step, [&](int64_t begin, int64_t end) {
        int64_t c = begin;
        for (; c + 4 * step <= end; c += 4 * step) {
            VF s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
            for (int64_t r = 0; r < rows; ++r) {
                const float* p = a + r * stride + c;
                s0 = hn::Add(s0, hn::LoadU(d, p));
                s1 = hn::Add(s1, hn::LoadU(d, p + step));
                s2 = hn::Add(s2, hn::LoadU(d, p + 2 * step));
                s3 = hn::Add(s3, hn::LoadU(d, p + 3 * step));
            }
            hn::StoreU(hn::Add(s0, hn::LoadU(d, sum + c)), d, sum + c);
            hn::StoreU(hn::Add(s1, hn::LoadU(d, sum + c + step)), d, sum + c + step);
            hn::StoreU(hn::Add(s2, hn::LoadU(d, sum + c + 2 * step)), d, sum + c + 2 * step);
            hn::StoreU(hn::Add(s3, hn::LoadU(d, sum + c + 3 * step)), d, sum + c + 3 * step);
        }
        for (; c < end; ++c) {
            float s = 0;
            for (int64_t r = 0; r < rows; ++r) s += a[r * stride + c];
            sum[c] += s;
        }
    });
}

// --- few rows -----------------------------------------------------------------------------------------
//
// x is prepared as f32 in the order in which the weights arrive. One vector load of 2N bf16 weights gives
// the N even ones by a shift and the N odd ones by a mask, so per 2N columns x has the N even ones first,
// then the N odd ones. The columns after the last whole 2N (for f32: all) are in order; rows end in zeros, up
// to a multiple of N.

template <class X>
HWY_INLINE VF LoadOne(DF d, const X* x) {
    if constexpr (sizeof(X) == 4) {
        return hn::LoadU(d, x);
    } else {
        return FromBf16(d, hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(x)));
    }
}

template <class X>
HWY_INLINE void PrepareRowForBf16(int64_t columns, int64_t padded, const X* x, float* out) {
    const DF d;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    int64_t c = 0;
    for (; c + 2 * n <= columns; c += 2 * n) {
        const VF a = FromBf16(d, ToBf16(LoadOne(d, x + c))), b = FromBf16(d, ToBf16(LoadOne(d, x + c + n)));
#if HWY_TARGET == HWY_SCALAR
        hn::StoreU(a, d, out + c);
        hn::StoreU(b, d, out + c + n);
#else
        hn::StoreU(hn::ConcatEven(d, b, a), d, out + c);
        hn::StoreU(hn::ConcatOdd(d, b, a), d, out + c + n);
#endif
    }
    for (; c < columns; ++c) out[c] = static_cast<float>(bf16(static_cast<float>(x[c])));
    std::fill(out + columns, out + padded, 0.0f);
}

template <class W>
void PrepareX(const FewRows& a, int64_t padded, float* out) {
    dispatch_activation(a.x.dtype, "linear", [&]<class X>() {
        for (int64_t t = 0; t < a.t; ++t, out += padded) {
            const X* x = static_cast<const X*>(a.x.data) + t * a.x.stride;
            if constexpr (sizeof(W) == 4) {
                ConvertRow(a.i, x, out);
                std::fill(out + a.i, out + padded, 0.0f);
            } else {
                PrepareRowForBf16(a.i, padded, x, out);
            }
        }
    });
}

// acc[r][t] += w[r][at..at+N) . x[t][c..c+N), in order.
template <int R, int T, class W>
HWY_INLINE void StepInOrder(DF d, const W* const* w, int64_t at, const float* x, int64_t padded,
                            VF (&acc)[R][T]) {
    VF weight[R];
    for (int r = 0; r < R; ++r) weight[r] = LoadOne(d, w[r] + at);
    for (int t = 0; t < T; ++t) {
        const VF xv = hn::LoadU(d, x + t * padded);
        for (int r = 0; r < R; ++r) acc[r][t] = hn::MulAdd(weight[r], xv, acc[r][t]);
    }
}

// N pairs of bf16, the even one in the lower half (little endian).
HWY_INLINE VU LoadPairs(const bf16* p) {
#if HWY_TARGET == HWY_SCALAR
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return hn::Set(DU(), pair);
#else
    return hn::BitCast(DU(),
                       hn::LoadU(hn::Repartition<uint16_t, DU>(), reinterpret_cast<const uint16_t*>(p)));
#endif
}

// The same for 2N columns in the order even, odd.
template <int R, int T>
HWY_INLINE void StepPairs(DF d, const bf16* const* w, int64_t at, const float* x, int64_t padded,
                          VF (&acc)[R][T]) {
    const DU du;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    VF even[R], odd[R];
    for (int r = 0; r < R; ++r) {
        const VU pair = LoadPairs(w[r] + at);
        even[r] = hn::BitCast(d, hn::ShiftLeft<16>(pair));
        odd[r] = hn::BitCast(d, hn::And(pair, hn::Set(du, 0xffff0000u)));
    }
    for (int t = 0; t < T; ++t) {
        const VF x_even = hn::LoadU(d, x + t * padded);
        const VF x_odd = hn::LoadU(d, x + t * padded + n);
        for (int r = 0; r < R; ++r) {
            acc[r][t] = hn::MulAdd(even[r], x_even, acc[r][t]);
            acc[r][t] = hn::MulAdd(odd[r], x_odd, acc[r][t]);
        }
    }
}

// sums[0..4) = the sums of a, b, c and e over their lanes: a transposition costs less than four reductions.
HWY_INLINE void SumFour(VF a, VF b, VF c, VF e, float* sums) {
#if HWY_TARGET == HWY_SCALAR
    sums[0] = hn::GetLane(a);
    sums[1] = hn::GetLane(b);
    sums[2] = hn::GetLane(c);
    sums[3] = hn::GetLane(e);
#else
    const DF d;
    const hn::Repartition<double, DF> wide;
    const auto as_wide = [&](VF v) { return hn::BitCast(wide, v); };
    const VF ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
    const VF ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
    const VF lower = hn::BitCast(d, hn::InterleaveLower(wide, as_wide(ab), as_wide(ce)));
    const VF upper = hn::BitCast(d, hn::InterleaveUpper(wide, as_wide(ab), as_wide(ce)));
    HWY_ALIGN float blocks[HWY_MAX_BYTES / sizeof(float)];
    hn::Store(hn::Add(lower, upper), d, blocks);  // [a b c e] per 128-bit block
    const hn::FixedTag<float, 4> d4;
    auto total = hn::Load(d4, blocks);
    for (size_t i = 4; i < hn::Lanes(d); i += 4) total = hn::Add(total, hn::Load(d4, blocks + i));
    hn::StoreU(total, d4, sums);
#endif
}

// sums[t * kWeightRows + r] = w[r] . x[t] for R rows of the weight and T of x.
template <int R, int T, class W>
HWY_INLINE void Dots(const W* weight, int64_t apart, int64_t columns, const float* x, int64_t padded,
                     float* sums) {
    const DF d;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    const W* w[R];
    for (int r = 0; r < R; ++r) w[r] = weight + r * apart;
    VF acc[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = hn::Zero(d);
    }
    int64_t c = 0;
    if constexpr (sizeof(W) == 2) {
        for (; c + 2 * n <= columns; c += 2 * n) StepPairs<R, T>(d, w, c, x + c, padded, acc);
    }
    for (; c + n <= columns; c += n) StepInOrder<R, T>(d, w, c, x + c, padded, acc);
    if (c < columns) {  // the last columns, filled up with zeros
        W tail[R][HWY_MAX_BYTES / sizeof(float)] = {};
        const W* last[R];
        for (int r = 0; r < R; ++r) {
            std::copy(w[r] + c, w[r] + columns, tail[r]);
            last[r] = tail[r];
        }
        StepInOrder<R, T>(d, last, 0, x + c, padded, acc);
    }
    for (int t = 0; t < T; ++t) {
        float* s = sums + t * kWeightRows;
        if constexpr (R == kWeightRows) {
            SumFour(acc[0][t], acc[1][t], acc[2][t], acc[3][t], s);
        } else {  // in the same order, so that a row's sum does not depend on where the block begins
            const VF zero = hn::Zero(d);
            SumFour(acc[0][t], zero, zero, zero, s);
        }
    }
}

// Rows o, o + apart, ... of the weight: R of them.
struct BlockAt {
    int64_t o, apart;
};

template <class Y>
HWY_INLINE void WriteBlock(const FewRows& a, BlockAt at, int rows, int64_t t0, int t_count,
                           const float* sums) {
    for (int t = 0; t < t_count; ++t) {
        Y* y = static_cast<Y*>(a.y) + (t0 + t) * a.y_stride;
        for (int r = 0; r < rows; ++r) {
            const int64_t o = at.o + r * at.apart;
            y[o] = static_cast<Y>(sums[t * kWeightRows + r] + (a.bias != nullptr ? a.bias[o] : 0.0f));
        }
    }
}

template <int R, class W>
HWY_INLINE void Block(const FewRows& a, BlockAt at, const float* x, int64_t padded) {
    const W* w = static_cast<const W*>(a.weight.data) + at.o * a.weight.stride;
    const int64_t apart = at.apart * a.weight.stride;
    float sums[kXRows * kWeightRows];
    for (int64_t t = 0; t < a.t; t += kXRows) {
        const int count = static_cast<int>(std::min<int64_t>(kXRows, a.t - t));
        const float* xt = x + t * padded;
        if (count == 1) {
            Dots<R, 1>(w, apart, a.i, xt, padded, sums);
        } else if (count == 2) {
            Dots<R, 2>(w, apart, a.i, xt, padded, sums);
        } else if (count == 3) {
            Dots<R, (kXRows >= 3 ? 3 : 1)>(w, apart, a.i, xt, padded, sums);
        } else {
            Dots<R, (kXRows >= 4 ? 4 : 1)>(w, apart, a.i, xt, padded, sums);
        }
        if (a.y_dtype == DType::f32) {
            WriteBlock<float>(a, at, R, t, count, sums);
        } else {
            WriteBlock<bf16>(a, at, R, t, count, sums);
        }
    }
}

// A thread reads its rows as kWeightRows long streams, a quarter of them each: the hardware's prefetchers
// follow a stream, and would have to find it again for every row of a block of neighbours.
template <class W>
void Rows(const Exec& ex, const FewRows& a) {
    const auto n = static_cast<int64_t>(hn::Lanes(DF()));
    const int64_t padded = (a.i + n - 1) / n * n;
    const Scratch<float> x(ex, static_cast<size_t>(a.t * padded));
    PrepareX<W>(a, padded, x.data());
    parallel_for(ex, a.o, kWeightRows, [&](int64_t begin, int64_t end) {
        const int64_t quarter = (end - begin) / kWeightRows;
        for (int64_t o = begin; o < begin + quarter; ++o) {
            Block<kWeightRows, W>(a, {o, quarter}, x.data(), padded);
        }
        for (int64_t o = begin + kWeightRows * quarter; o < end; ++o) {
            Block<1, W>(a, {o, 0}, x.data(), padded);
        }
    });
}

void FewRowsAny(const Exec& ex, const FewRows& a) {
    dispatch_activation(a.weight.dtype, "linear", [&]<class W>() { Rows<W>(ex, a); });
}

}  // namespace ssm::linear_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::linear_detail {

HWY_EXPORT(ConvertAny);
HWY_EXPORT(AddColumnSums);
HWY_EXPORT(FewRowsAny);

void convert_rows(const Exec& ex, int64_t rows, int64_t columns, const Matrix& from, void* to, DType to_dtype,
                  int64_t to_stride) {
    HWY_DYNAMIC_DISPATCH(ConvertAny)(ex, rows, columns, from, to, to_dtype, to_stride);
}

void add_column_sums(const Exec& ex, View<const float, 2> a, float* sum) noexcept {
    HWY_DYNAMIC_DISPATCH(AddColumnSums)(ex, a.shape[0], a.shape[1], a.data, a.stride, sum);
}

void few_rows(const Exec& ex, const FewRows& args) { HWY_DYNAMIC_DISPATCH(FewRowsAny)(ex, args); }

}  // namespace ssm::linear_detail
#endif
