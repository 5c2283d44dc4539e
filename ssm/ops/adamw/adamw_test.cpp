#include "ssm/ops/adamw/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/targets.h"

namespace ssm {
namespace {

using test::expect_error;
using test::Random;

struct State {
    std::vector<float> param, grad, m, v;

    explicit State(int64_t count, uint64_t seed = 3) {
        Random random(seed);
        param = random.vector(count);
        grad = random.vector(count, -0.1f, 0.1f);
        m = random.vector(count, -0.1f, 0.1f);
        v = random.vector(count, 0.0f, 0.01f);
    }
    void step(const Exec& ex, const AdamWOptions& o, int64_t from = 0) {
        const int64_t n = std::ssize(param) - from;
        adamw_step(ex, {param.data() + from, {n}}, {grad.data() + from, {n}}, {m.data() + from, {n}},
                   {v.data() + from, {n}}, o);
    }
};

// The three lines of the header in f64.
struct Exact {
    std::vector<double> param, m, v;

    explicit Exact(const State& s)
        : param(test::to_double(s.param)), m(test::to_double(s.m)), v(test::to_double(s.v)) {}
    void step(const std::vector<float>& grad, const AdamWOptions& o) {
        const double b1 = double{o.beta1}, b2 = double{o.beta2}, t = static_cast<double>(o.step);
        for (size_t i = 0; i < param.size(); ++i) {
            const double g = double{o.grad_scale} * double{grad[i]};
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            const double m_hat = m[i] / (1 - std::pow(b1, t)), v_hat = v[i] / (1 - std::pow(b2, t));
            param[i] -= double{o.lr} *
                        (m_hat / (std::sqrt(v_hat) + double{o.eps}) + double{o.weight_decay} * param[i]);
        }
    }
};

TEST(AdamW, OneStepMatchesReference) {
    test::for_each_target([] {
        for (const int64_t count : {0, 1, 15, 16, 17, 1000, 70001}) {
            for (const int64_t step : {1, 2, 1000, 1000000}) {
                SCOPED_TRACE(testing::Message() << "count " << count << " step " << step);
                const AdamWOptions o{
                    .lr = 3e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .step = step, .grad_scale = 0.3f};
                State s(count + 1);
                const State before = s;
                Exact exact(s);
                exact.step(s.grad, o);
                s.step(make_cpu_exec(2), o, 1);  // from the second element: misaligned
                EXPECT_EQ(s.param[0], before.param[0]);
                exact.param[0] = double{s.param[0]};
                exact.m[0] = double{s.m[0]};
                exact.v[0] = double{s.v[0]};
                test::expect_close(s.param, exact.param, 1e-6, "param");
                test::expect_close(s.m, exact.m, 1e-6, "m");
                test::expect_close(s.v, exact.v, 1e-6, "v");
                EXPECT_EQ(s.grad, before.grad);
            }
        }
    });
}

TEST(AdamW, ManyStepsFromZeroMomentsMatchReference) {
    State s(333);
    std::fill(s.m.begin(), s.m.end(), 0.0f);
    std::fill(s.v.begin(), s.v.end(), 0.0f);
    Exact exact(s);
    Random random(9);
    for (int64_t step = 1; step <= 200; ++step) {
        s.grad = random.vector(333, -0.1f, 0.1f);
        const AdamWOptions o{.lr = 1e-2f, .step = step};
        exact.step(s.grad, o);
        s.step(make_cpu_exec(1), o);
    }
    test::expect_close(s.param, exact.param, 1e-5, "param");
}

TEST(AdamW, ZeroGradientsDecayOnly) {
    State s(100);
    for (auto* p : {&s.grad, &s.m, &s.v}) std::fill(p->begin(), p->end(), 0.0f);
    std::vector<double> expected = test::to_double(s.param);
    for (double& p : expected) p *= 1 - 0.5 * 0.125;
    s.step(make_cpu_exec(1), {.lr = 0.5f, .weight_decay = 0.125f});
    test::expect_close(s.param, expected, 1e-7, "param");
}

TEST(AdamW, SameBytesOnAnyThreads) {
    State one(100000), many(100000);
    one.step(make_cpu_exec(1), {});
    many.step(make_cpu_exec(5), {});
    EXPECT_EQ(one.param, many.param);
    EXPECT_EQ(one.v, many.v);
}

TEST(SquaredNorm, MatchesReferenceAndDoesNotDependOnThreads) {
    test::for_each_target([] {
        for (const int64_t n : {0, 1, 7, 16383, 16384, 16385, 200001}) {
            Random random(5);
            const std::vector<float> x = random.vector(n + 1, -3, 3);
            double expected = 0;
            for (size_t i = 1; i < x.size(); ++i) expected += double{x[i]} * double{x[i]};
            const double one = squared_norm(make_cpu_exec(1), {x.data() + 1, {n}});
            EXPECT_NEAR(one, expected, 1e-12 * expected) << n;
            for (const int threads : {2, 3, 7}) {
                EXPECT_EQ(squared_norm(make_cpu_exec(threads), {x.data() + 1, {n}}), one) << n;
            }
        }
    });
}

TEST(SquaredNorm, KeepsNanAndOverflowsOnlyInF64) {
    std::vector<float> x(100, 1e30f);
    EXPECT_NEAR(squared_norm(make_cpu_exec(1), {x.data(), {100}}), 1e62, 1e55);
    x[42] = NAN;
    EXPECT_TRUE(std::isnan(squared_norm(make_cpu_exec(1), {x.data(), {100}})));
}

TEST(AdamW, Errors) {
    const Exec ex = make_cpu_exec(1);
    State s(4);
    const auto run = [&](const AdamWOptions& o) { s.step(ex, o); };
    expect_error("[adamw_step] step must be at least 1 but is 0", [&] { run({.step = 0}); });
    expect_error("[adamw_step] lr must be finite and >= 0 but is nan", [&] { run({.lr = NAN}); });
    expect_error("[adamw_step] beta1 must be in [0, 1) but is 1", [&] { run({.beta1 = 1}); });
    expect_error("[adamw_step] beta2 must be in [0, 1) but is -0.5", [&] { run({.beta2 = -0.5f}); });
    expect_error("[adamw_step] eps must be finite and >= 0 but is -1", [&] { run({.eps = -1}); });
    expect_error("[adamw_step] weight_decay must be finite and >= 0 but is -1",
                 [&] { run({.weight_decay = -1}); });
    expect_error("[adamw_step] grad_scale must be finite but is inf", [&] { run({.grad_scale = INFINITY}); });
    expect_error("[adamw_step] `m` must be [count] = [4] but is [3]", [&] {
        adamw_step(ex, {s.param.data(), {4}}, {s.grad.data(), {4}}, {s.m.data(), {3}}, {s.v.data(), {4}}, {});
    });
    expect_error("[adamw_step] arguments must be dense", [&] {
        adamw_step(ex, {s.param.data(), {2}, 2}, {s.grad.data(), {2}}, {s.m.data(), {2}}, {s.v.data(), {2}},
                   {});
    });
    expect_error("[squared_norm] `x` must be dense", [&] { squared_norm(ex, {s.param.data(), {2}, 2}); });
}

}  // namespace
}  // namespace ssm
