// Loads and stores of activations, f32 or bf16 in memory and f32 in registers, and the loop over a row with
// its tail. Included once per instruction set, inside a Highway translation unit (see any *_cpu.cpp).
//
//   ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR { Store(d, Load(d, x + i, lanes), y + i, lanes);
//   });
//
// `lanes` is AllLanes or, once at the end of a row, SomeLanes{count}: nothing outside the row is touched, and
// lanes past `count` load as 0. bf16 is stored rounded to nearest even; NaN stays NaN.
#if defined(SSM_CORE_SIMD_IO_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_CORE_SIMD_IO_INL_H_
#undef SSM_CORE_SIMD_IO_INL_H_
#else
#define SSM_CORE_SIMD_IO_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "ssm/core/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct AllLanes {};
struct SomeLanes {
    int64_t count;
};

// f32 -> the upper 16 bits, rounded to nearest even, in the low half of each 32-bit lane.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> RoundToBf16Bits([[maybe_unused]] D d, V v) {
    const hn::RebindToUnsigned<D> du;
    const auto u = hn::BitCast(du, v);
    const auto high = hn::ShiftRight<16>(u);
    const auto bias = hn::Add(hn::Set(du, 0x7fffu), hn::And(high, hn::Set(du, 1u)));
    const auto rounded = hn::ShiftRight<16>(hn::Add(u, bias));
    const auto quiet_nan = hn::Or(high, hn::Set(du, 0x40u));
    return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet_nan, rounded);
}

template <class D>
HWY_INLINE hn::Vec<D> Load(D d, const float* p, AllLanes) {
    return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> Load(D d, const bf16* p, AllLanes) {
    const hn::RebindToUnsigned<D> du;
    const hn::Rebind<uint16_t, D> d16;
    const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}
template <class D, class T>
HWY_INLINE hn::Vec<D> Load(D d, const T* p, SomeLanes lanes) {
    T buffer[hn::MaxLanes(D())] = {};
    std::memcpy(buffer, p, static_cast<size_t>(lanes.count) * sizeof(T));
    return Load(d, buffer, AllLanes{});
}

template <class D>
HWY_INLINE void Store(D d, hn::Vec<D> v, float* p, AllLanes) {
    hn::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void Store(D d, hn::Vec<D> v, bf16* p, AllLanes) {
    const hn::RebindToSigned<D> di;
    const hn::Rebind<uint16_t, D> d16;
    const auto bits = hn::BitCast(di, RoundToBf16Bits(d, v));
    hn::StoreU(hn::DemoteTo(d16, bits), d16, reinterpret_cast<uint16_t*>(p));
}
template <class D, class T>
HWY_INLINE void Store(D d, hn::Vec<D> v, T* p, SomeLanes lanes) {
    T buffer[hn::MaxLanes(D())];
    Store(d, v, buffer, AllLanes{});
    std::memcpy(p, buffer, static_cast<size_t>(lanes.count) * sizeof(T));
}

// Calls body(i, lanes) for i = 0, L, 2L, ... below n, L the number of lanes of d.
template <class D, class Body>
HWY_INLINE void ForEachVector(D d, int64_t n, Body&& body) {
    const int64_t width = static_cast<int64_t>(hn::Lanes(d));
    int64_t i = 0;
    for (; i + width <= n; i += width) body(i, AllLanes{});
    if (i < n) body(i, SomeLanes{n - i});
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include-once per target
