// The CUDA kernels against the CPU's (which elementwise_test.cpp holds against f64), dense, strided and
// misaligned.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "ssm/ops/elementwise/elementwise.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

struct Case {
    int64_t t, d, offset, apart;  // columns before a row and after it, in a wider tensor
    int64_t width() const { return offset + d + apart; }
};

const std::vector<Case>& cases() {
    static const std::vector<Case> all{{0, 5, 0, 0},    {1, 1, 0, 0},  {1, 4, 0, 0},    {3, 5, 0, 0},
                                       {3, 4, 0, 0},    {7, 53, 1, 2}, {100, 64, 8, 8}, {100, 64, 2, 6},
                                       {513, 96, 0, 0}, {255, 8, 0, 8}};
    return all;
}

// f(ex, a, b, y) by the CPU and by the GPU from the same memory: y starts at `start`, what lies between rows
// stays.
template <class A, class Y>
void check(double tolerance, float start,
           const std::function<void(const Exec&, View<const A, 2>, View<const float, 2>, View<Y, 2>)>& f) {
    for (const Case& c : cases()) {
        SCOPED_TRACE(testing::Message() << "t " << c.t << " d " << c.d << " offset " << c.offset);
        test::Random random(1);
        const int64_t size = c.t * c.width();
        auto a = random.vector<A>(size, -8.0f, 8.0f);
        auto b = random.vector<float>(size, -8.0f, 8.0f);
        if (size > 0) a[static_cast<size_t>(c.offset)] = static_cast<A>(NAN);
        if (size > 1) a.back() = static_cast<A>(80.0f);
        std::vector<Y> y(static_cast<size_t>(size), static_cast<Y>(start));
        for (auto* v : {&b}) v->reserve(1);
        a.reserve(1), y.reserve(1);
        const Tensor a_there = test::on_device(a, {c.t, c.width()}),
                     b_there = test::on_device(b, {c.t, c.width()}),
                     y_there = test::on_device(y, {c.t, c.width()});
        const auto there = [&](const Tensor& x) { return x.columns(c.offset, c.offset + c.d); };
        f(make_cpu_exec(2), {a.data() + c.offset, {c.t, c.d}, c.width()},
          {b.data() + c.offset, {c.t, c.d}, c.width()}, {y.data() + c.offset, {c.t, c.d}, c.width()});
        f(test::cuda_exec(), there(a_there).template view<const A, 2>(),
          there(b_there).template view<const float, 2>(), there(y_there).template view<Y, 2>());
        test::expect_close(test::from_device<Y>(y_there), test::to_double(y), tolerance, "y");
    }
}

using In = View<const float, 2>;
using Out = View<float, 2>;

TEST(ElementwiseCuda, FunctionsMatchCpu) {
    check<float, float>(1e-6, NAN, [](const Exec& ex, In a, In, Out y) { neg_exp(ex, a, y); });
    check<float, float>(1e-6, NAN, [](const Exec& ex, In a, In, Out y) { silu(ex, a, y); });
    check<float, float>(1e-6, NAN, [](const Exec& ex, In a, In, Out y) { softplus(ex, a, y); });
    check<float, float>(0, NAN, [](const Exec& ex, In a, In b, Out y) { add(ex, a, b, y); });
    check<float, float>(0, NAN, [](const Exec& ex, In a, In b, Out y) { multiply(ex, a, b, y); });
}

TEST(ElementwiseCuda, AccumulatesMatchCpu) {
    const auto all = [](const Exec& ex, auto a, In, auto y) { accumulate(ex, a, y, 3.7f); };
    check<float, float>(1e-6, 0.25f, all);
    check<float, bf16>(1e-3, 0.25f, all);
    check<bf16, float>(1e-6, 0.25f, all);
    check<bf16, bf16>(1e-3, 0.25f, all);
}

TEST(ElementwiseCuda, GradientsMatchCpu) {
    constexpr float kStart = test::kGradientStart;
    check<float, float>(1e-6, kStart,
                        [](const Exec& ex, In a, In b, Out y) { neg_exp_backward(ex, a, b, y); });
    check<float, float>(1e-6, kStart, [](const Exec& ex, In a, In b, Out y) { silu_backward(ex, a, b, y); });
    check<float, float>(1e-6, kStart,
                        [](const Exec& ex, In a, In b, Out y) { softplus_backward(ex, a, b, y); });
    check<float, float>(1e-6, kStart,
                        [](const Exec& ex, In a, In b, Out y) { multiply_backward(ex, a, a, b, y, {}); });
    check<float, float>(1e-6, kStart,
                        [](const Exec& ex, In a, In b, Out y) { multiply_backward(ex, a, b, b, {}, y); });
}

TEST(ElementwiseCuda, CastsMatchCpu) {
    check<float, float>(0, 1, [](const Exec& ex, auto a, In, auto y) { cast<float, float>(ex, a, y); });
    check<float, bf16>(0, 1, [](const Exec& ex, auto a, In, auto y) { cast<float, bf16>(ex, a, y); });
    check<bf16, float>(0, 1, [](const Exec& ex, auto a, In, auto y) { cast<bf16, float>(ex, a, y); });
    check<bf16, bf16>(0, 1, [](const Exec& ex, auto a, In, auto y) { cast<bf16, bf16>(ex, a, y); });
}

TEST(ElementwiseCuda, InPlace) {
    const auto x = test::Random(1).vector(1000);
    const Tensor there = test::on_device(x, {10, 100});
    std::vector<float> here = x;
    silu(make_cpu_exec(1), {x.data(), {10, 100}}, {here.data(), {10, 100}});
    silu(test::cuda_exec(), there.view<const float, 2>(), there.view<float, 2>());
    test::expect_close(test::from_device<float>(there), here, 1e-6, "silu in place");
}

}  // namespace
}  // namespace ssm
