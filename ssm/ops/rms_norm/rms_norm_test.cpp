#include "ssm/ops/rms_norm/rms_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "ssm/core/dtype.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/gradcheck.h"
#include "tests/support/strided.h"
#include "tests/support/targets.h"

namespace ssm {
namespace {

using Gate = RmsNormOptions::Gate;
using test::expect_error;
using test::Random;
using test::Strided;

struct Case {
    int64_t t, d;
    RmsNormOptions options;
    bool weighted = true;
};

// The equations of the header in f64.
struct Reference {
    int64_t t, d;
    RmsNormOptions options;
    std::vector<double> x, weight, z;  // weight and z may be empty
    std::vector<double> y, rstd;

    double gate(int64_t i) const {
        const double v = z[static_cast<size_t>(i)];
        return v / (1 + std::exp(-v));
    }
    void run() {
        const int64_t groups = options.groups, n = d / groups;
        y.assign(x.size(), 0);
        rstd.assign(static_cast<size_t>(t * groups), 0);
        for (int64_t r = 0; r < t * groups; ++r) {
            const int64_t first = r / groups * d + r % groups * n;
            double sum = 0;
            for (int64_t i = first; i < first + n; ++i) {
                const double v = x[static_cast<size_t>(i)] * (options.gate == Gate::before ? gate(i) : 1);
                sum += v * v;
            }
            const double scale = 1 / std::sqrt(sum / static_cast<double>(n) + double{options.eps});
            rstd[static_cast<size_t>(r)] = scale;
            for (int64_t i = first; i < first + n; ++i) {
                double v = x[static_cast<size_t>(i)] * scale;
                if (options.gate != Gate::none) v *= gate(i);
                if (!weight.empty()) {
                    v *= weight[static_cast<size_t>(i % d)] + (options.unit_offset ? 1 : 0);
                }
                y[static_cast<size_t>(i)] = v;
            }
        }
    }
};

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const Gate gate : {Gate::none, Gate::before, Gate::after}) {
        for (const bool weighted : {true, false}) {
            for (const bool unit : {false, true}) {
                all.push_back({3, 35, {.eps = 1e-5f, .unit_offset = unit, .gate = gate}, weighted});
            }
            all.push_back({5, 132, {.eps = 1e-6f, .groups = 4, .gate = gate}, weighted});
        }
        for (const int64_t t : {0, 1, 2, 31, 32, 33, 97}) all.push_back({t, 17, {.gate = gate}});
        for (const int64_t d : {1, 15, 16, 17, 63, 64, 65, 768}) all.push_back({2, d, {.gate = gate}});
        all.push_back({400, 200, {.groups = 5, .gate = gate}});  // enough work for two threads
    }
    return all;
}

template <class Y>
double tolerance() {
    return std::is_same_v<Y, bf16> ? 5e-3 : 2e-6;
}

template <class X, class Y>
struct Data {
    Strided<X> x;
    Strided<Y> z;
    std::vector<float> weight;
    Reference reference;

    explicit Data(const Case& c, uint64_t seed = 7)
        : x(c.t, c.d, NAN), z(c.t, c.d, NAN), reference{c.t, c.d, c.options, {}, {}, {}, {}, {}} {
        Random random(seed);
        x.assign(random.vector(c.t * c.d, -2, 2));
        reference.x = test::to_double(x.values());
        if (c.weighted) weight = random.vector(c.d, -1, 2);
        reference.weight = test::to_double(weight);
        z.assign(random.vector(c.t * c.d, -4, 4));
        if (c.options.gate != Gate::none) reference.z = test::to_double(z.values());
        reference.run();
    }
    RmsNormInputs<X, Y> inputs() {
        RmsNormInputs<X, Y> in;
        in.x = x.view();
        if (!weight.empty()) in.weight = {weight.data(), {std::ssize(weight)}};
        if (reference.options.gate != Gate::none) in.z = z.view();
        return in;
    }
};

template <class X, class Y>
void check_forward(const Case& c, int threads) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " d " << c.d << " groups " << c.options.groups
                                    << " gate " << static_cast<int>(c.options.gate) << " weighted "
                                    << c.weighted << " threads " << threads);
    Data<X, Y> data(c);
    Strided<Y> y(c.t, c.d, 9.0f);
    y.assign(std::vector<float>(static_cast<size_t>(c.t * c.d), NAN));
    Strided<float> rstd(c.t, c.options.groups, 9.0f);
    rstd.assign(std::vector<float>(static_cast<size_t>(c.t * c.options.groups), NAN));
    const Exec ex = make_cpu_exec(threads);
    rms_norm(ex, data.inputs(), y.view(), rstd.view(), c.options);
    test::expect_close(y.values(), data.reference.y, tolerance<Y>(), "y");
    test::expect_close(rstd.values(), data.reference.rstd, 2e-6, "rstd");
    EXPECT_TRUE(y.gaps_untouched(9.0f) && rstd.gaps_untouched(9.0f));
}

TEST(RmsNorm, MatchesReference) {
    test::for_each_target([] {
        for (const Case& c : cases()) {
            for (const int threads : {1, 2}) {
                check_forward<float, float>(c, threads);
                check_forward<float, bf16>(c, threads);
                check_forward<bf16, bf16>(c, threads);
            }
        }
    });
}

TEST(RmsNorm, OutputMayAliasInputAndRstdMayBeAbsent) {
    for (const Gate gate : {Gate::none, Gate::before, Gate::after}) {
        const Case c{4, 70, {.groups = 2, .gate = gate}};
        Data<float, float> data(c);
        rms_norm(make_cpu_exec(1), data.inputs(), data.x.view(), {}, c.options);
        test::expect_close(data.x.values(), data.reference.y, 2e-6, "y");
    }
}

TEST(RmsNorm, TinyRowsAndHugeRowsStayFinite) {
    for (const float scale : {1e-20f, 1e18f}) {
        std::vector<float> x(64, scale), y = test::nan_vector(64);
        rms_norm<float, float>(make_cpu_exec(1), {{x.data(), {1, 64}}, {}, {}}, {y.data(), {1, 64}}, {});
        const double expected =
            double{scale} / std::sqrt(double{scale} * double{scale} + double{RmsNormOptions{}.eps});
        for (const float v : y) EXPECT_NEAR(v, expected, 2e-6 * expected);
    }
}

template <class X, class Y>
void check_add(int64_t t, int64_t d, int64_t groups, bool in_place) {
    SCOPED_TRACE(testing::Message() << "t " << t << " d " << d << " groups " << groups);
    const RmsNormOptions options{.eps = 1e-5f, .groups = groups};
    Random random(11);
    Strided<float> residual(t, d, 9.0f), out(t, d, 9.0f);
    Strided<X> x(t, d, NAN);
    Strided<Y> y(t, d, 9.0f);
    residual.assign(random.vector(t * d, -3, 3));
    x.assign(random.vector(t * d));
    const std::vector<float> weight = random.vector(d, 0, 2);
    out.assign(std::vector<float>(static_cast<size_t>(t * d), NAN));
    y.assign(std::vector<float>(static_cast<size_t>(t * d), NAN));
    std::vector<double> sum = test::to_double(residual.values());
    const std::vector<double> second = test::to_double(x.values());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += second[i];
    Reference reference{t, d, options, sum, test::to_double(weight), {}, {}, {}};
    reference.run();
    Strided<float>& target = in_place ? residual : out;
    add_rms_norm<X, Y>(make_cpu_exec(2), residual.view(), x.view(), {weight.data(), {d}}, target.view(),
                       y.view(), {}, options);
    test::expect_close(target.values(), sum, 1e-7, "residual_out");
    test::expect_close(y.values(), reference.y, tolerance<Y>(), "y");
    EXPECT_TRUE(y.gaps_untouched(9.0f) && target.gaps_untouched(9.0f));
}

TEST(AddRmsNorm, MatchesReference) {
    test::for_each_target([] {
        for (const bool in_place : {false, true}) {
            for (const int64_t t : {0, 1, 5, 130}) {
                check_add<float, float>(t, 97, 1, in_place);
                check_add<float, bf16>(t, 97, 1, in_place);
                check_add<bf16, bf16>(t, 97, 1, in_place);
                check_add<bf16, bf16>(t, 768, 3, in_place);
            }
        }
    });
}

// The whole batch equals its rows one at a time: there is nothing else to a step of this operator.
TEST(RmsNorm, StepsFoldToSequence) {
    const Case c{9, 48, {.groups = 3, .gate = Gate::before}};
    Data<float, float> data(c);
    const Exec ex = make_cpu_exec(2);
    Strided<float> whole(c.t, c.d, 0), steps(c.t, c.d, 0);
    RmsNormInputs<float, float> in = data.inputs();
    rms_norm(ex, in, whole.view(), {}, c.options);
    for (int64_t i = 0; i < c.t; ++i) {
        const RmsNormInputs<float, float> one{{in.x.row(i), {1, c.d}}, in.weight, {in.z.row(i), {1, c.d}}};
        rms_norm(ex, one, View<float, 2>{steps.row(i), {1, c.d}}, {}, c.options);
    }
    EXPECT_EQ(whole.storage, steps.storage);
}

// Gradients of sum(grad_y * y) against finite differences of the f64 reference.
// `set`: they are written over NaN instead of added.
void check_gradients(const Case& c, bool set, double tol) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " d " << c.d << " groups " << c.options.groups
                                    << " gate " << static_cast<int>(c.options.gate) << " unit "
                                    << c.options.unit_offset << " weighted " << c.weighted);
    Data<float, float> data(c);
    Strided<float> grad_y(c.t, c.d, NAN), grad_x(c.t, c.d, 9.0f), grad_z(c.t, c.d, 9.0f),
        branch(c.t, c.d, 9.0f);
    Random random(13);
    grad_y.assign(random.vector(c.t * c.d));
    const std::vector<float> start(static_cast<size_t>(c.t * c.d), set ? NAN : test::kGradientStart);
    grad_x.assign(start);
    grad_z.assign(start);
    std::vector<float> grad_weight(static_cast<size_t>(c.d), test::kGradientStart);
    std::vector<float> rstd;
    for (const double r : data.reference.rstd) rstd.push_back(static_cast<float>(r));

    Reference& reference = data.reference;
    const std::vector<double> upstream = test::to_double(grad_y.values());
    const auto loss = [&] {
        reference.run();
        double sum = 0;
        for (size_t i = 0; i < upstream.size(); ++i) sum += upstream[i] * reference.y[i];
        return sum;
    };
    const std::vector<double> want_x = test::finite_differences(reference.x, loss);
    const std::vector<double> want_weight = test::finite_differences(reference.weight, loss);
    const std::vector<double> want_z = test::finite_differences(reference.z, loss);

    const bool gated = c.options.gate != Gate::none;
    RmsNormGradients<float, float> grad{grad_x.view(), {}, {}, branch.view(), set, set};
    if (c.weighted) grad.weight = {grad_weight.data(), {c.d}};
    if (gated) grad.z = grad_z.view();
    rms_norm_backward(make_cpu_exec(2), data.inputs(), {rstd.data(), {c.t, c.options.groups}}, grad_y.view(),
                      grad, c.options);
    const auto now = [&](std::vector<float> v) { return set ? v : test::added(v); };
    EXPECT_EQ(branch.values(), grad_x.values());
    test::expect_close(now(grad_x.values()), want_x, tol, "grad x");
    if (c.weighted) test::expect_close(test::added(grad_weight), want_weight, tol, "grad weight");
    if (gated) test::expect_close(now(grad_z.values()), want_z, tol, "grad z");
    EXPECT_TRUE(grad_x.gaps_untouched(9.0f) && grad_z.gaps_untouched(9.0f) && branch.gaps_untouched(9.0f));
}

TEST(RmsNorm, GradientsMatchFiniteDifferences) {
    test::for_each_target([] {
        for (const Gate gate : {Gate::none, Gate::before, Gate::after}) {
            for (const bool weighted : {true, false}) {
                for (const int64_t groups : {1, 3}) {
                    const Case c{
                        5, 51, {.groups = groups, .unit_offset = groups == 3, .gate = gate}, weighted};
                    check_gradients(c, false, 1e-5);
                    check_gradients(c, true, 1e-5);
                }
            }
        }
    });
}

// More rows than a block: the fixed blocks of the weight gradient are all there, once.
TEST(RmsNorm, WeightGradientSumsEveryRowAndDoesNotDependOnThreads) {
    for (const int64_t t : {31, 32, 33, 5000}) {
        const Case c{t, 24, {.gate = Gate::after}};
        Data<float, float> data(c);
        Random random(17);
        const std::vector<float> grad_y = random.vector(t * c.d);
        std::vector<float> rstd;
        for (const double r : data.reference.rstd) rstd.push_back(static_cast<float>(r));
        std::vector<double> expected(static_cast<size_t>(c.d), 0);
        for (int64_t i = 0; i < t * c.d; ++i) {
            expected[static_cast<size_t>(i % c.d)] += double{grad_y[static_cast<size_t>(i)]} *
                                                      data.reference.y[static_cast<size_t>(i)] /
                                                      double{data.weight[static_cast<size_t>(i % c.d)]};
        }
        std::vector<float> first;
        for (const int threads : {1, 2, 3, 5}) {
            std::vector<float> grad(static_cast<size_t>(c.d), test::kGradientStart);
            rms_norm_backward<float, float>(make_cpu_exec(threads), data.inputs(), {rstd.data(), {t, 1}},
                                            {grad_y.data(), {t, c.d}}, {{}, {grad.data(), {c.d}}, {}},
                                            c.options);
            if (first.empty()) first = grad;
            EXPECT_EQ(grad, first) << threads << " threads";
        }
        test::expect_close(test::added(first), expected, 1e-5, "grad weight");
    }
}

TEST(RmsNorm, Errors) {
    const Exec ex = make_cpu_exec(1);
    std::vector<float> x(12), y(12), w(12);
    const View<const float, 2> xv{x.data(), {2, 6}};
    const View<float, 2> yv{y.data(), {2, 6}};
    const auto run = [&](RmsNormInputs<float, float> in, View<float, 2> out, RmsNormOptions o) {
        rms_norm<float, float>(ex, in, out, {}, o);
    };
    expect_error("[rms_norm] `y` must be [t d] = [2, 6] but is [3, 4]", [&] {
        run({xv, {}, {}}, {y.data(), {3, 4}}, {});
    });
    expect_error("[rms_norm] `y` must be [t d] = [2, 6] but is absent", [&] { run({xv, {}, {}}, {}, {}); });
    expect_error("[rms_norm] `weight` must be [d] = [6] but is [5]", [&] {
        run({xv, {w.data(), {5}}, {}}, yv, {});
    });
    expect_error("[rms_norm] groups = 4 does not divide d = 6", [&] {
        run({xv, {}, {}}, yv, {.groups = 4});
    });
    expect_error("[rms_norm] eps must be >= 0 but is -1", [&] { run({xv, {}, {}}, yv, {.eps = -1.0f}); });
    expect_error("[rms_norm] `z` is absent but there is a gate", [&] {
        run({xv, {}, {}}, yv, {.gate = Gate::after});
    });
    expect_error("[rms_norm] `z` is given but there is no gate", [&] { run({xv, {}, xv}, yv, {}); });
    expect_error("[add_rms_norm] `residual` must be [t d] = [2, 6] but is [1, 6]", [&] {
        add_rms_norm<float, float>(ex, {x.data(), {1, 6}}, xv, {}, yv, yv, {});
    });
    expect_error("[add_rms_norm] a gate is not supported",
                 [&] { add_rms_norm<float, float>(ex, xv, xv, {}, yv, yv, {}, {.gate = Gate::after}); });
    expect_error("[rms_norm_backward] `rstd` must be [t groups] = [2, 1] but is absent", [&] {
        rms_norm_backward<float, float>(ex, {xv, {}, {}}, {}, xv, {});
    });
    expect_error("[rms_norm_backward] `grad.weight` is given but `weight` is absent", [&] {
        rms_norm_backward<float, float>(ex, {xv, {}, {}}, {x.data(), {2, 1}}, xv, {{}, {w.data(), {6}}, {}});
    });
    expect_error("[rms_norm_backward] `grad.branch` is given but `grad.x` is absent", [&] {
        rms_norm_backward<float, float>(ex, {xv, {}, {}}, {x.data(), {2, 1}}, xv, {{}, {}, {}, yv});
    });
    std::vector<bf16> low(12);
    expect_error(
        "[rms_norm_backward] gradients of bf16 activations need a GPU",
        [&] {
            rms_norm_backward<float, bf16>(ex, {xv, {}, {}}, {x.data(), {2, 1}}, {low.data(), {2, 6}},
                                           {yv, {}, {}});
        },
        ErrorCode::unsupported);
}

}  // namespace
}  // namespace ssm
