#include "ssm/ops/elementwise/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "ssm/core/dtype.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/gradcheck.h"
#include "tests/support/strided.h"
#include "tests/support/targets.h"

namespace ssm {
namespace {

using test::expect_error;
using test::Random;
using test::Strided;

struct Function {
    const char* name;
    void (*forward)(const Exec&, View<const float, 2>, View<float, 2>);
    void (*backward)(const Exec&, View<const float, 2>, View<const float, 2>, View<float, 2>);
    double (*exact)(double);
    bool backward_takes_y;
};
const Function kFunctions[] = {
    {"neg_exp", neg_exp, neg_exp_backward, [](double x) { return -std::exp(x); }, true},
    {"silu", silu, silu_backward, [](double x) { return x / (1 + std::exp(-x)); }, false},
    {"softplus", softplus, softplus_backward,
     [](double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }, false},
};

struct Size {
    int64_t t, d;
    bool strided;
};
const Size kSizes[] = {{0, 5, false}, {1, 1, false},  {3, 17, true},     {5, 64, true},    {2, 15, false},
                       {4, 16, true}, {7, 33, false}, {300, 250, false}, {300, 250, true}, {1, 70001, true}};

std::vector<float> gradient_start(const Size& s) {
    return std::vector<float>(static_cast<size_t>(s.t * s.d), test::kGradientStart);
}

TEST(Elementwise, MatchesReferenceInEveryElement) {
    test::for_each_target([] {
        for (const Function& f : kFunctions) {
            for (const Size& s : kSizes) {
                SCOPED_TRACE(testing::Message() << f.name << " [" << s.t << ", " << s.d << "]");
                Random random(3);
                Strided<float> x(s.t, s.d, NAN, s.strided), y(s.t, s.d, 9.0f, s.strided);
                x.assign(random.vector(s.t * s.d, -30, 30));
                y.assign(std::vector<float>(static_cast<size_t>(s.t * s.d), NAN));
                f.forward(make_cpu_exec(2), x.view(), y.view());
                double worst = 0;
                for (int64_t i = 0; i < s.t * s.d; ++i) {
                    const double expected = f.exact(double{x.row(i / s.d)[i % s.d]});
                    const double error = std::fabs(double{y.row(i / s.d)[i % s.d]} - expected);
                    worst = std::isnan(error) ? INFINITY : std::max(worst, error / std::fabs(expected));
                }
                EXPECT_LE(worst, 1e-6);
                EXPECT_TRUE(y.gaps_untouched(9.0f));
                f.forward(make_cpu_exec(1), x.view(), x.view());  // in place, on other threads
                EXPECT_EQ(x.values(), y.values());
            }
        }
    });
}

TEST(Elementwise, LimitsAndNan) {
    test::for_each_target([] {
        for (const Function& f : kFunctions) {
            SCOPED_TRACE(f.name);
            const std::vector<float> x = {NAN, 0, -0.0f, 85, -80, -200, 1e-30f};
            std::vector<float> y = test::nan_vector(7);
            f.forward(make_cpu_exec(1), {x.data(), {1, 7}}, {y.data(), {1, 7}});
            EXPECT_TRUE(std::isnan(y[0]));
            for (size_t i = 1; i < x.size(); ++i) {
                const double expected = f.exact(double{x[i]});
                EXPECT_NEAR(y[i], expected, 1e-6 * std::fabs(expected) + 1e-35) << x[i];
            }
        }
    });
}

TEST(Elementwise, GradientsMatchFiniteDifferences) {
    test::for_each_target([] {
        for (const Function& f : kFunctions) {
            for (const Size& s : kSizes) {
                SCOPED_TRACE(testing::Message() << f.name << " [" << s.t << ", " << s.d << "]");
                Random random(3);
                Strided<float> x(s.t, s.d, NAN, s.strided), y(s.t, s.d, NAN, s.strided);
                Strided<float> grad_y(s.t, s.d, NAN, s.strided), grad_x(s.t, s.d, 9.0f, s.strided);
                x.assign(random.vector(s.t * s.d, -4, 4));
                grad_y.assign(random.vector(s.t * s.d));
                grad_x.assign(gradient_start(s));
                f.forward(make_cpu_exec(1), x.view(), y.view());
                f.backward(make_cpu_exec(2), f.backward_takes_y ? y.view() : x.view(), grad_y.view(),
                           grad_x.view());
                std::vector<double> expected;  // each output depends on its own input alone
                for (int64_t i = 0; i < s.t * s.d; ++i) {
                    const double at = double{x.row(i / s.d)[i % s.d]}, h = 1e-5;
                    const double slope = (f.exact(at + h) - f.exact(at - h)) / (2 * h);
                    expected.push_back(slope * double{grad_y.row(i / s.d)[i % s.d]});
                }
                test::expect_close(test::added(grad_x.values()), expected, 1e-5, "grad_x");
                EXPECT_TRUE(grad_x.gaps_untouched(9.0f));
            }
        }
    });
}

TEST(Elementwise, SumsAndProducts) {
    test::for_each_target([] {
        for (const Size& s : kSizes) {
            SCOPED_TRACE(testing::Message() << "[" << s.t << ", " << s.d << "] strided " << s.strided);
            const Exec ex = make_cpu_exec(2);
            Random random(3);
            Strided<float> a(s.t, s.d, NAN, s.strided), b(s.t, s.d, NAN), y(s.t, s.d, 9.0f, s.strided);
            Strided<float> grad_y(s.t, s.d, NAN), grad_a(s.t, s.d, 9.0f), grad_b(s.t, s.d, 9.0f);
            a.assign(random.vector(s.t * s.d, -4, 4));
            b.assign(random.vector(s.t * s.d, -4, 4));
            grad_y.assign(random.vector(s.t * s.d));
            grad_a.assign(gradient_start(s));
            grad_b.assign(gradient_start(s));
            const std::vector<float> u = a.values(), v = b.values(), g = grad_y.values();
            std::vector<float> sum, product;
            std::vector<double> scaled, want_a, want_b;
            for (size_t i = 0; i < u.size(); ++i) {
                sum.push_back(u[i] + v[i]);
                product.push_back(u[i] * v[i]);
                scaled.push_back(double{u[i]} * double{v[i]} + 0.25 * double{u[i]});
                want_a.push_back(double{g[i]} * double{v[i]});
                want_b.push_back(double{g[i]} * double{u[i]});
            }
            y.assign(std::vector<float>(u.size(), NAN));
            add(ex, a.view(), b.view(), y.view());
            EXPECT_EQ(y.values(), sum);
            y.assign(std::vector<float>(u.size(), NAN));
            multiply(ex, a.view(), b.view(), y.view());
            EXPECT_EQ(y.values(), product);
            accumulate<float, float>(ex, a.view(), y.view(), 0.25f);
            test::expect_close(y.values(), scaled, 1e-6, "accumulate");
            multiply_backward(ex, a.view(), b.view(), grad_y.view(), grad_a.view(), {});
            multiply_backward(ex, a.view(), b.view(), grad_y.view(), {}, grad_b.view());
            test::expect_close(test::added(grad_a.values()), want_a, 1e-6, "grad_a");
            test::expect_close(test::added(grad_b.values()), want_b, 1e-6, "grad_b");
            EXPECT_TRUE(y.gaps_untouched(9.0f) && grad_a.gaps_untouched(9.0f) && grad_b.gaps_untouched(9.0f));
            add(ex, a.view(), b.view(), a.view());
            EXPECT_EQ(a.values(), sum) << "in place";
        }
    });
}

std::vector<uint16_t> bits(const std::vector<bf16>& v) {
    std::vector<uint16_t> r;
    for (const bf16 x : v) r.push_back(x.bits);
    return r;
}

// y += scale x with the sum in f32, rounded once.
template <class X, class Y>
void check_accumulate(const Size& s) {
    Random random(4);
    Strided<X> x(s.t, s.d, NAN, s.strided);
    Strided<Y> y(s.t, s.d, 9.0f, s.strided);
    x.assign(random.vector(s.t * s.d));
    y.assign(random.vector(s.t * s.d));
    std::vector<Y> want;
    const auto u = x.values();
    const auto v = y.values();
    for (size_t i = 0; i < u.size(); ++i)
        want.push_back(static_cast<Y>(std::fma(static_cast<float>(u[i]), 0.75f, static_cast<float>(v[i]))));
    accumulate<X, Y>(make_cpu_exec(2), x.view(), y.view(), 0.75f);
    // A target without fused multiply-add rounds twice.
    test::expect_close(y.values(), test::to_double(want), sizeof(Y) == 2 ? 1e-3 : 1e-6, "accumulate");
    EXPECT_TRUE(y.gaps_untouched(9.0f));
}

TEST(Accumulate, EveryPairOfTypes) {
    test::for_each_target([] {
        for (const Size& s : kSizes) {
            check_accumulate<float, float>(s);
            check_accumulate<float, bf16>(s);
            check_accumulate<bf16, float>(s);
            check_accumulate<bf16, bf16>(s);
        }
    });
}

TEST(Cast, EqualsTheScalarConversionToTheBit) {
    test::for_each_target([] {
        for (const Size& s : kSizes) {
            Random random(3);
            Strided<float> x(s.t, s.d, NAN, s.strided), back(s.t, s.d, 9.0f, s.strided), copy(s.t, s.d, 9.0f);
            Strided<bf16> y(s.t, s.d, 9.0f), copy16(s.t, s.d, 9.0f);
            std::vector<float> values = random.vector(s.t * s.d, -1e5f, 1e5f);
            const float special[] = {NAN,         INFINITY,      -INFINITY, 0.0f,    -0.0f,   1.00390625f,
                                     1.01171875f, 3.4028235e38f, 1e-40f,    -1.005f, 65504.0f};
            for (size_t i = 0; i < values.size() && i < std::size(special); ++i) values[i] = special[i];
            x.assign(values);
            cast<float, bf16>(make_cpu_exec(2), x.view(), y.view());
            EXPECT_EQ(bits(y.values()), bits(test::to_bf16(values)));
            cast<bf16, float>(make_cpu_exec(2), y.view(), back.view());
            cast<bf16, bf16>(make_cpu_exec(2), y.view(), copy16.view());
            cast<float, float>(make_cpu_exec(2), x.view(), copy.view());
            EXPECT_EQ(bits(copy16.values()), bits(y.values()));
            EXPECT_EQ(bits(test::to_bf16(back.values())), bits(y.values()));
            for (int64_t i = 0; i < s.t * s.d; ++i) {
                const float want = values[static_cast<size_t>(i)], got = copy.row(i / s.d)[i % s.d];
                ASSERT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << i;
            }
            EXPECT_TRUE(y.gaps_untouched(9.0f) && back.gaps_untouched(9.0f) && copy.gaps_untouched(9.0f));
        }
    });
}

TEST(Elementwise, Errors) {
    const Exec ex = make_cpu_exec(1);
    std::vector<float> p(6);
    const View<const float, 2> x{p.data(), {2, 3}};
    const View<float, 2> y{p.data(), {2, 3}}, bad{p.data(), {3, 2}};
    expect_error("[silu] `y` must be [t d] = [2, 3] but is [3, 2]", [&] { silu(ex, x, bad); });
    expect_error("[softplus] `x` is absent", [&] { softplus(ex, {}, y); });
    expect_error("[neg_exp] `y` must be [t d] = [2, 3] but is absent", [&] { neg_exp(ex, x, {}); });
    expect_error("[neg_exp_backward] `grad_y` must be [t d] = [2, 3] but is [3, 2]",
                 [&] { neg_exp_backward(ex, x, bad, y); });
    expect_error("[silu_backward] `grad_x` must be [t d] = [2, 3] but is [3, 2]",
                 [&] { silu_backward(ex, x, x, bad); });
    expect_error("[add] `b` must be [t d] = [2, 3] but is [3, 2]", [&] { add(ex, x, bad, y); });
    expect_error("[multiply] `b` must be [t d] = [2, 3] but is [3, 2]", [&] { multiply(ex, x, bad, y); });
    expect_error("[multiply_backward] `grad_b` must be [t d] = [2, 3] but is [3, 2]",
                 [&] { multiply_backward(ex, x, x, x, y, bad); });
    expect_error("[accumulate] `y` must be [t d] = [2, 3] but is [3, 2]",
                 [&] { accumulate<float, float>(ex, x, bad); });
    expect_error("[cast] `y` must be [t d] = [2, 3] but is [3, 2]", [&] { cast<float, float>(ex, x, bad); });
}

}  // namespace
}  // namespace ssm
