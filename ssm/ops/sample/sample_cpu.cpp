// Vector kernels of the sampler. One thread: a vocabulary of 50,280 logits is 200 KB, a few microseconds.
#include "ssm/ops/sample/sample_impl.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/sample/sample_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h, once per instruction set
#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr float kInf = std::numeric_limits<float>::infinity();

// The largest of x[0..n); sets `nan` when there is a NaN (the result is meaningless then).
HWY_INLINE float MaxOf(const float* x, int64_t n, bool& nan) {
    const DF d;
    const int64_t width = static_cast<int64_t>(hn::Lanes(d));
    VF m0 = hn::Set(d, -kInf), m1 = m0;
    auto bad = hn::IsNaN(m0);
    int64_t i = 0;
    for (; i + 2 * width <= n; i += 2 * width) {
        const VF v0 = hn::LoadU(d, x + i), v1 = hn::LoadU(d, x + i + width);
        m0 = hn::Max(m0, v0);
        m1 = hn::Max(m1, v1);
        bad = hn::Or(bad, hn::IsNaN(hn::Add(hn::Abs(v0), hn::Abs(v1))));  // inf - inf would be NaN too
    }
    float max = hn::GetLane(hn::MaxOfLanes(d, hn::Max(m0, m1)));
    nan = nan || !hn::AllFalse(d, bad);
    for (; i < n; ++i) {
        max = x[i] > max ? x[i] : max;
        nan = nan || std::isnan(x[i]);
    }
    return max;
}

cpu::Largest LargestOf(const float* x, int64_t n) {
    constexpr int64_t kBlock = 1024;
    float max = -kInf;
    int64_t block = 0;
    bool nan = false;
    for (int64_t b = 0; b < n; b += kBlock) {
        const float m = MaxOf(x + b, std::min(kBlock, n - b), nan);
        block = m > max ? b : block;
        max = m > max ? m : max;
    }
    const float* end = x + std::min(n, block + kBlock);
    const float* at = std::find(x + block, end, max);
    return {nan ? 0 : at - x, max, nan};
}

bool BlockMaxima(const float* x, int64_t n, float* maxima) {
    bool nan = false;
    for (int64_t b = 0; b < n; b += cpu::kLogitBlock) {
        *maxima++ = MaxOf(x + b, std::min(cpu::kLogitBlock, n - b), nan);
    }
    return !nan;
}

void ExpWeights(const float* x, int64_t n, float max, float inv_temperature, float* w) {
    const DF d;
    const VF maxes = hn::Set(d, max), scale = hn::Set(d, inv_temperature), low = hn::Set(d, -87.0f);
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF e = hn::Mul(hn::Sub(Load(d, x + i, lanes), maxes), scale);
        Store(d, hn::IfThenElseZero(hn::Ge(e, low), Exp(d, e)), w + i, lanes);
    });
}

void BlockSums(const float* w, int64_t n, double* sums) {
    const hn::ScalableTag<double> d;
    const hn::Rebind<float, decltype(d)> df;
    for (int64_t b = 0; b < n; b += cpu::kLogitBlock) {
        auto sum = hn::Zero(d);
        ForEachVector(d, std::min(cpu::kLogitBlock, n - b), [&](int64_t i, auto lanes) HWY_ATTR {
            sum = hn::Add(sum, hn::PromoteTo(d, Load(df, w + b + i, lanes)));
        });
        *sums++ = hn::GetLane(hn::SumOfLanes(d, sum));
    }
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cpu {
namespace {
HWY_EXPORT(LargestOf);
HWY_EXPORT(BlockMaxima);
HWY_EXPORT(ExpWeights);
HWY_EXPORT(BlockSums);
}  // namespace

Largest largest(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(LargestOf)(x, n); }
bool block_maxima(const float* x, int64_t n, float* maxima) {
    return HWY_DYNAMIC_DISPATCH(BlockMaxima)(x, n, maxima);
}
void exp_weights(const float* x, int64_t n, float max, float inv_temperature, float* w) {
    HWY_DYNAMIC_DISPATCH(ExpWeights)(x, n, max, inv_temperature, w);
}
void block_sums(const float* w, int64_t n, double* sums) { HWY_DYNAMIC_DISPATCH(BlockSums)(w, n, sums); }

}  // namespace ssm::cpu
#endif  // HWY_ONCE
