// Per row of logits: the maximum, the sum of exponentials, and the gradient of the loss.
#include "ssm/ops/cross_entropy/cross_entropy_impl.h"

#include <cmath>
#include <limits>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/cross_entropy/cross_entropy_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::cross_entropy_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// The largest of v values, or NaN if one of them is: a vector maximum alone would drop it.
float MaxOrNan(const float* x, int64_t v) {
    const DF d;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    VF m0 = hn::Set(d, lowest), m1 = m0;
    auto bad = hn::IsNaN(m0);
    int64_t j = 0;
    for (; j + 2 * step <= v; j += 2 * step) {
        const VF a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + step);
        bad = hn::Or(bad, hn::Or(hn::IsNaN(a), hn::IsNaN(b)));
        m0 = hn::Max(m0, a);
        m1 = hn::Max(m1, b);
    }
    bool nan = !hn::AllFalse(d, bad);
    float m = hn::GetLane(hn::MaxOfLanes(d, hn::Max(m0, m1)));
    for (; j < v; ++j) {
        nan = nan || std::isnan(x[j]);
        m = x[j] > m ? x[j] : m;
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : m;
}

// sum_j e^(x_j - m); if `Store`, the exponentials replace x.
template <bool Store>
float SumExp(float* x, int64_t v, float m) {
    const DF d;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    const VF shift = hn::Set(d, m);
    VF s0 = hn::Zero(d), s1 = s0;
    int64_t j = 0;
    for (; j + 2 * step <= v; j += 2 * step) {
        const VF a = ssm::HWY_NAMESPACE::Exp(d, hn::Sub(hn::LoadU(d, x + j), shift));
        const VF b = ssm::HWY_NAMESPACE::Exp(d, hn::Sub(hn::LoadU(d, x + j + step), shift));
        s0 = hn::Add(s0, a);
        s1 = hn::Add(s1, b);
        if constexpr (Store) {
            hn::StoreU(a, d, x + j);
            hn::StoreU(b, d, x + j + step);
        }
    }
    float s = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
    for (; j < v; ++j) {
        const float e = std::exp(x[j] - m);
        s += e;
        if constexpr (Store) x[j] = e;
    }
    return s;
}

// log sum_j e^x_j - x_target = (m - x_target) + log s, where s >= 1.
float Nll(const float m, float x_target, float s) { return (m - x_target) + std::log(s); }

void Scale(float* x, int64_t v, float by) {
    const DF d;
    const auto step = static_cast<int64_t>(hn::Lanes(d));
    const VF factor = hn::Set(d, by);
    int64_t j = 0;
    for (; j + step <= v; j += step) hn::StoreU(hn::Mul(hn::LoadU(d, x + j), factor), d, x + j);
    for (; j < v; ++j) x[j] *= by;
}

void GradientRow(const Rows& r, int64_t i) {
    float* x = r.logits + i * r.v;
    const int32_t target = r.targets[i];
    if (target < 0) {
        r.nll[i] = 0.0f;
        std::fill(x, x + r.v, 0.0f);
        return;
    }
    const float g = r.grad_nll[i];
    const float m = MaxOrNan(x, r.v), x_target = x[target];
    if (!std::isfinite(m)) {
        r.nll[i] = std::numeric_limits<float>::quiet_NaN();
        std::fill(x, x + r.v, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    const float s = SumExp<true>(x, r.v, m);
    r.nll[i] = Nll(m, x_target, s);
    Scale(x, r.v, g / s);
    x[target] -= g;
}

void NllOfRows(const Exec& ex, const Rows& r) {
    parallel_for(ex, r.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* x = r.logits + i * r.v;
            if (r.targets[i] < 0) {
                r.nll[i] = 0.0f;
                continue;
            }
            const float m = MaxOrNan(x, r.v);
            r.nll[i] = std::isfinite(m) ? Nll(m, x[r.targets[i]], SumExp<false>(x, r.v, m))
                                        : std::numeric_limits<float>::quiet_NaN();
        }
    });
}

void GradientsOfRows(const Exec& ex, const Rows& r) {
    parallel_for(ex, r.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) GradientRow(r, i);
    });
}

}  // namespace ssm::cross_entropy_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cross_entropy_detail {

HWY_EXPORT(NllOfRows);
HWY_EXPORT(GradientsOfRows);

void nll_of_rows(const Exec& ex, const Rows& r) noexcept { HWY_DYNAMIC_DISPATCH(NllOfRows)(ex, r); }
void nll_and_gradients_of_rows(const Exec& ex, const Rows& r) noexcept {
    HWY_DYNAMIC_DISPATCH(GradientsOfRows)(ex, r);
}

}  // namespace ssm::cross_entropy_detail
#endif
