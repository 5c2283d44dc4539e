// Vector exp, sigmoid, SiLU, softplus for f32 Highway vectors of any width. Included once per instruction
// set, inside a Highway translation unit (see any *_cpu.cpp).
//
// Exp        |rel. error| <= 2e-7 on [-87, 88]; below -87 flushes to exp(-87) ~ 1.6e-38, above 88 saturates.
// ExpFast    one multiply-add cheaper: |rel. error| <= 4e-7; exactly 1 at 0. For decays exp(dt A) <= 1.
// Softplus   log(1 + e^x): |rel. error| <= 6e-7 everywhere, also where e^x is tiny.
#if defined(SSM_CORE_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_CORE_SIMD_MATH_INL_H_
#undef SSM_CORE_SIMD_MATH_INL_H_
#else
#define SSM_CORE_SIMD_MATH_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 1.5 * 2^23: x + kRound rounds x to the nearest integer n and has n in its low bits (|x| < 2^22). Cheaper
// than a conversion, which has to care for overflow: four instructions fewer on AVX-512.
inline constexpr float kRound = 12582912.0f;

// p * 2^n where `rounded` = n + kRound: n is added to the exponent of p.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ScaleByPowerOf2(D d, V p, V rounded) {
    const hn::RebindToSigned<D> di;
    return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, rounded))));
}

// 2^t for t in [-126, 127], t already in base 2: 2^n * 2^f, n = round(t), f in [-1/2, 1/2].
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2Fast(D d, V t) {
    const V round = hn::Set(d, kRound);
    t = hn::Max(t, hn::Set(d, -126.0f));
    const V rounded = hn::Add(t, round);
    const V f = hn::Sub(t, hn::Sub(rounded, round));
    V p = hn::Set(d, 0.001326472707f);
    p = hn::MulAdd(p, f, hn::Set(d, 0.009671512649f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.055507337437f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.240222420852f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.693146977599f));
    p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
    return ScaleByPowerOf2(d, p, rounded);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpFast(D d, V x) {
    return Exp2Fast(d, hn::Mul(x, hn::Set(d, 1.442695041f)));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
    x = hn::Min(hn::Max(x, hn::Set(d, -87.0f)), hn::Set(d, 88.0f));
    const V rounded = hn::MulAdd(x, hn::Set(d, 1.442695041f), hn::Set(d, kRound));
    const V n = hn::Sub(rounded, hn::Set(d, kRound));
    // r = x - n ln 2 in two parts, |r| <= ln2 / 2
    V r = hn::NegMulAdd(n, hn::Set(d, 0.693145751953125f), x);
    r = hn::NegMulAdd(n, hn::Set(d, 1.428606765330187e-06f), r);
    const V f = hn::Mul(r, hn::Set(d, 1.442695041f));
    V p = hn::Set(d, 0.0001535336184742f);
    p = hn::MulAdd(p, f, hn::Set(d, 0.001339887443671f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.009618437358103f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.05550332471055f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.2402264791362f));
    p = hn::MulAdd(p, f, hn::Set(d, 0.6931472028551f));
    p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
    return ScaleByPowerOf2(d, p, rounded);
}

// 1 / (1 + e^-x)
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
    const V one = hn::Set(d, 1.0f);
    return hn::Div(one, hn::Add(one, Exp(d, hn::Neg(x))));
}

// x sigmoid(x)
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Silu(D d, V x) {
    return hn::Div(x, hn::Add(hn::Set(d, 1.0f), Exp(d, hn::Neg(x))));
}

// d/dx silu(x) = s (1 + x (1 - s)), s = sigmoid(x)
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SiluDerivative(D d, V x) {
    const V one = hn::Set(d, 1.0f);
    const V s = Sigmoid(d, x);
    return hn::Mul(s, hn::MulAdd(x, hn::Sub(one, s), one));
}

// log(1 + y) for y in [0, 1]
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Log1pUnit(D d, V y) {
    V p = hn::Set(d, -0.003318472403f);
    p = hn::MulAdd(p, y, hn::Set(d, 0.020204584321f));
    p = hn::MulAdd(p, y, hn::Set(d, -0.057664443211f));
    p = hn::MulAdd(p, y, hn::Set(d, 0.106805554355f));
    p = hn::MulAdd(p, y, hn::Set(d, -0.153553962869f));
    p = hn::MulAdd(p, y, hn::Set(d, 0.196954005555f));
    p = hn::MulAdd(p, y, hn::Set(d, -0.249585874329f));
    p = hn::MulAdd(p, y, hn::Set(d, 0.333305113227f));
    p = hn::MulAdd(p, y, hn::Set(d, -0.499999327638f));
    return hn::Mul(y, hn::MulAdd(p, y, hn::Set(d, 1.0f)));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|)
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Softplus(D d, V x) {
    return hn::Add(hn::Max(x, hn::Zero(d)), Log1pUnit(d, Exp(d, hn::Neg(hn::Abs(x)))));
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include-once per target
