// CPU kernels of adamw: one pass over memory each.
#include "ssm/ops/adamw/adamw_impl.h"

#include <algorithm>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/adamw/adamw_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h, once per instruction set
#include "ssm/core/simd_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

void AdamWRun(int64_t n, float* param, float* grad, float* m, float* v, bf16* rounded,
              const AdamWConstants& c, bool keep_grad) {
    const DF d;
    const VF beta1 = hn::Set(d, c.beta1), g1 = hn::Set(d, c.g1), beta2 = hn::Set(d, c.beta2),
             g2 = hn::Set(d, c.g2), decay = hn::Set(d, c.decay), rate = hn::Set(d, c.rate),
             inv_bias2 = hn::Set(d, c.inv_bias2), eps = hn::Set(d, c.eps), zero = hn::Zero(d);
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF g = Load(d, grad + i, lanes);
        const VF new_m = hn::MulAdd(beta1, Load(d, m + i, lanes), hn::Mul(g1, g));
        const VF new_v = hn::MulAdd(beta2, Load(d, v + i, lanes), hn::Mul(hn::Mul(g2, g), g));
        const VF step = hn::Div(hn::Mul(rate, new_m), hn::MulAdd(hn::Sqrt(new_v), inv_bias2, eps));
        Store(d, new_m, m + i, lanes);
        Store(d, new_v, v + i, lanes);
        const VF new_param = hn::MulSub(decay, Load(d, param + i, lanes), step);
        Store(d, new_param, param + i, lanes);
        if (!keep_grad) Store(d, zero, grad + i, lanes);
        if (rounded != nullptr) Store(d, new_param, rounded + i, lanes);
    });
}

double SumOfSquaresRun(int64_t n, const float* x) {
    const hn::ScalableTag<double> d;
    const hn::Rebind<float, decltype(d)> df;
    const int64_t width = static_cast<int64_t>(hn::Lanes(d));
    auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    const auto square_add = [&](int64_t i, auto lanes, auto& sum) HWY_ATTR {
        const auto wide = hn::PromoteTo(d, Load(df, x + i, lanes));
        sum = hn::MulAdd(wide, wide, sum);
    };
    int64_t i = 0;
    for (; i + 4 * width <= n; i += 4 * width) {
        square_add(i, AllLanes{}, s0);
        square_add(i + width, AllLanes{}, s1);
        square_add(i + 2 * width, AllLanes{}, s2);
        square_add(i + 3 * width, AllLanes{}, s3);
    }
    for (; i + width <= n; i += width) square_add(i, AllLanes{}, s0);
    if (i < n) square_add(i, SomeLanes{n - i}, s1);
    return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cpu {
namespace {

HWY_EXPORT(AdamWRun);
HWY_EXPORT(SumOfSquaresRun);

// A thread is worth waking for this many elements (measured: README.md).
constexpr int64_t kGrainElements = 16384;

}  // namespace

void adamw_step(const Exec& ex, int64_t count, float* param, float* grad, float* m, float* v, bf16* rounded,
                const AdamWConstants& c, bool keep_grad) {
    const auto kernel = HWY_DYNAMIC_DISPATCH(AdamWRun);
    parallel_for(ex, count, kGrainElements, [&](int64_t begin, int64_t end) {
        kernel(end - begin, param + begin, grad + begin, m + begin, v + begin,
               rounded != nullptr ? rounded + begin : nullptr, c, keep_grad);
    });
}

double squared_norm(const Exec& ex, int64_t count, const float* x) {
    const auto kernel = HWY_DYNAMIC_DISPATCH(SumOfSquaresRun);
    if (count <= kGrainElements) return kernel(count, x);
    const int64_t blocks = (count + kGrainElements - 1) / kGrainElements;
    const Scratch<double> partial(ex, static_cast<size_t>(blocks));
    parallel_for(ex, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * kGrainElements;
            partial.data()[b] = kernel(std::min(kGrainElements, count - first), x + first);
        }
    });
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial.data()[b];
    return sum;
}

}  // namespace ssm::cpu
#endif  // HWY_ONCE
