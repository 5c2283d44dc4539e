// Pieces shared by the forward and backward kernels of the selective scan. Included once per instruction
// set. One channel per lane: a block of kLanes channels is a column of vectors, one per state index n, so
// nothing is ever summed across lanes on the way forward, and B[t,n], C[t,n] are broadcasts.
#if defined(SSM_OPS_SELECTIVE_SCAN_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_OPS_SELECTIVE_SCAN_TILE_INL_H_
#undef SSM_OPS_SELECTIVE_SCAN_TILE_INL_H_
#else
#define SSM_OPS_SELECTIVE_SCAN_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <utility>

#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"
#include "ssm/ops/selective_scan/selective_scan.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using ScanTag = hn::CappedTag<float, 16>;
using ScanVec = hn::Vec<ScanTag>;
inline constexpr int64_t kLanes = hn::MaxLanes(ScanTag());
inline constexpr float kLog2e = 1.442695041f;

// Calls f(integral_constant 0), ..., f(integral_constant kCount - 1): arrays of vectors stay in registers.
template <size_t kCount, class F>
HWY_INLINE void Unroll(F&& f) {
    [&]<size_t... kI>(std::index_sequence<kI...>) HWY_ATTR __attribute__((always_inline)) {
        (f(std::integral_constant<size_t, kI>{}), ...);
    }
    (std::make_index_sequence<kCount>{});
}

// Covers 0..n with pieces whose size is a compile-time constant: as many kMax as fit, then 8, 4, 2, 1.
// f(first, integral_constant size).
template <size_t kMax, class F>
HWY_INLINE void ForEachStatePiece(int64_t n, F&& f) {
    int64_t j = 0;
    for (; j + static_cast<int64_t>(kMax) <= n; j += kMax) f(j, std::integral_constant<size_t, kMax>{});
    if constexpr (kMax > 8) {
        if (n - j >= 8) f(j, std::integral_constant<size_t, 8>{}), j += 8;
    }
    if constexpr (kMax > 4) {
        if (n - j >= 4) f(j, std::integral_constant<size_t, 4>{}), j += 4;
    }
    if (n - j >= 2) f(j, std::integral_constant<size_t, 2>{}), j += 2;
    if (n - j >= 1) f(j, std::integral_constant<size_t, 1>{});
}

// Calls f(AllLanes or SomeLanes) for the block of channels that starts at c of d.
template <class F>
HWY_INLINE void WithLanes(int64_t c, int64_t d, F&& f) {
    if (c + kLanes <= d) {
        f(AllLanes{});
    } else {
        f(SomeLanes{d - c});
    }
}

// Rows [d n] of a state or of A, channels c.. -> block [n kLanes]; channels past d are 0. Null rows: all 0.
inline void LoadBlock(const float* rows, int64_t row_stride, int64_t channels, int64_t n, float* block) {
    std::fill_n(block, n * kLanes, 0.0f);
    if (rows == nullptr) return;
    for (int64_t i = 0; i < std::min(channels, kLanes); ++i) {
        for (int64_t j = 0; j < n; ++j) block[j * kLanes + i] = rows[i * row_stride + j];
    }
}
inline void StoreBlock(const float* block, int64_t channels, int64_t n, float* rows, int64_t row_stride) {
    for (int64_t i = 0; i < std::min(channels, kLanes); ++i) {
        for (int64_t j = 0; j < n; ++j) rows[i * row_stride + j] = block[j * kLanes + i];
    }
}

// The sum of all lanes.
template <class D, class V = hn::Vec<D>>
HWY_INLINE float SumToFloat(D d, V v) {
    return hn::GetLane(hn::SumOfLanes(d, v));
}

// out[i] = the sum of the lanes of vi: four sums for the price of about one and a half.
#if HWY_TARGET == HWY_SCALAR
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreSums(D d, V v0, V v1, V v2, V v3, float* out) {
    out[0] = SumToFloat(d, v0), out[1] = SumToFloat(d, v1);
    out[2] = SumToFloat(d, v2), out[3] = SumToFloat(d, v3);
}
#else
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AddInterleaved(D d, V a, V b) {
    return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
}
// The sum of the 128-bit blocks of v.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreBlockSums(D d, V v, float* out) {
    if constexpr (hn::MaxLanes(D()) > 4) {
        const hn::Half<D> half;
        StoreBlockSums(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), out);
    } else {
        hn::StoreU(v, d, out);
    }
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreSums(D d, V v0, V v1, V v2, V v3, float* out) {
    if constexpr (hn::MaxLanes(D()) == 1) {
        out[0] = SumToFloat(d, v0), out[1] = SumToFloat(d, v1);
        out[2] = SumToFloat(d, v2), out[3] = SumToFloat(d, v3);
    } else {
        // v0 + v2 and v1 + v3 interleaved, then the four sums, in every 128-bit block.
        const V v02 = AddInterleaved(d, v0, v2), v13 = AddInterleaved(d, v1, v3);
        StoreBlockSums(d, AddInterleaved(d, v02, v13), out);
    }
}
#endif

// An optional per-channel argument at channel c.
template <class Lanes>
HWY_INLINE ScanVec LoadChannels(View<const float, 1> v, int64_t c, Lanes lanes) {
    const ScanTag d;
    return v ? Load(d, v.data + c, lanes) : hn::Zero(d);
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include-once per target
