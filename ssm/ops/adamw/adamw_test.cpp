#include "ssm/ops/adamw/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "ssm/ops/adamw/adamw_impl.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/targets.h"

namespace ssm {
namespace {

using test::expect_error;
using test::Random;

struct Rates {
    float lr = 1e-3f;
    int64_t step = 1;

    double bias(float beta) const { return 1 - std::pow(double{beta}, static_cast<double>(step)); }
    std::vector<float> values(const AdamWOptions& o) const {
        return {lr, static_cast<float>(bias(o.beta1)), static_cast<float>(bias(o.beta2))};
    }
};

// One parameter.
struct State {
    std::vector<float> param, grad, m, v;
    float weight_decay = 0.1f;

    explicit State(int64_t count, uint64_t seed = 3) {
        Random random(seed);
        param = random.vector(count);
        grad = random.vector(count, -0.1f, 0.1f);
        m = random.vector(count, -0.1f, 0.1f);
        v = random.vector(count, 0.0f, 0.01f);
    }
    AdamWParameter parameter(int64_t from = 0) {
        const int64_t n = std::ssize(param) - from;
        return {{param.data() + from, {n}},
                {grad.data() + from, {n}},
                {m.data() + from, {n}},
                {v.data() + from, {n}},
                {},
                weight_decay};
    }
    void step(const Exec& ex, const AdamWOptions& o, const Rates& r, float norm = 1.0f, int64_t from = 0) {
        adamw_step(ex, AdamWTable(ex, {parameter(from)}), o, {r.values(o).data(), {3}}, {&norm, {1}});
    }
};

// The lines of the header in f64.
struct Exact {
    std::vector<double> param, m, v;
    double weight_decay;

    explicit Exact(const State& s)
        : param(test::to_double(s.param)),
          m(test::to_double(s.m)),
          v(test::to_double(s.v)),
          weight_decay(double{s.weight_decay}) {}
    void step(const std::vector<float>& grad, const AdamWOptions& o, const Rates& r, double scale = 1) {
        const double b1 = double{o.beta1}, b2 = double{o.beta2};
        for (size_t i = 0; i < param.size(); ++i) {
            const double g = scale * double{grad[i]};
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            const double m_hat = m[i] / r.bias(o.beta1), v_hat = v[i] / r.bias(o.beta2);
            param[i] -= double{r.lr} * (m_hat / (std::sqrt(v_hat) + double{o.eps}) + weight_decay * param[i]);
        }
    }
};

TEST(AdamW, OneStepMatchesReference) {
    test::for_each_target([] {
        for (const int64_t count : {0, 1, 15, 16, 17, 1000, 70001}) {
            for (const int64_t step : {1, 2, 1000, 1000000}) {
                SCOPED_TRACE(testing::Message() << "count " << count << " step " << step);
                const AdamWOptions o{.beta1 = 0.9f, .beta2 = 0.999f, .clip = 0.6f};
                const Rates r{3e-3f, step};
                State s(count + 1);
                const State before = s;
                Exact exact(s);
                exact.step(s.grad, o, r, double{o.clip} / 2.0);
                s.step(make_cpu_exec(2), o, r, 2.0f, 1);  // from the second element: misaligned
                EXPECT_EQ(s.param[0], before.param[0]);
                EXPECT_EQ(s.grad[0], before.grad[0]);
                exact.param[0] = double{s.param[0]};
                exact.m[0] = double{s.m[0]};
                exact.v[0] = double{s.v[0]};
                test::expect_close(s.param, exact.param, 1e-6, "param");
                test::expect_close(s.m, exact.m, 1e-6, "m");
                test::expect_close(s.v, exact.v, 1e-6, "v");
                for (size_t i = 1; i < s.grad.size(); ++i) ASSERT_EQ(s.grad[i], 0.0f);
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
        exact.step(s.grad, {}, {1e-2f, step});
        s.step(make_cpu_exec(1), {}, {1e-2f, step});
    }
    test::expect_close(s.param, exact.param, 1e-5, "param");
}

TEST(AdamW, ZeroGradientsDecayOnly) {
    State s(100);
    s.weight_decay = 0.125f;
    for (auto* p : {&s.grad, &s.m, &s.v}) std::fill(p->begin(), p->end(), 0.0f);
    std::vector<double> expected = test::to_double(s.param);
    for (double& p : expected) p *= 1 - 0.5 * 0.125;
    s.step(make_cpu_exec(1), {}, {.lr = 0.5f});
    test::expect_close(s.param, expected, 1e-7, "param");
}

// A small norm does not scale gradients up, and without `clip` none does.
TEST(AdamW, ClipsOnlyWhatIsLarger) {
    State plain(100), small(100), off(100);
    plain.step(make_cpu_exec(1), {}, {}, 1.0f);
    small.step(make_cpu_exec(1), {.clip = 1.0f}, {}, 0.5f);
    off.step(make_cpu_exec(1), {.clip = 0.0f}, {}, 100.0f);
    EXPECT_EQ(small.param, plain.param);
    EXPECT_EQ(off.param, plain.param);
}

TEST(AdamW, BrokenNormLeavesAllButTheGradients) {
    for (const float norm : {NAN, INFINITY, -INFINITY}) {
        State s(100);
        const State before = s;
        s.step(make_cpu_exec(2), {.clip = 1.0f}, {}, norm);
        EXPECT_EQ(s.param, before.param);
        EXPECT_EQ(s.m, before.m);
        EXPECT_EQ(s.v, before.v);
        EXPECT_EQ(s.grad, std::vector<float>(100, 0.0f));
    }
}

TEST(AdamW, KeepsGradientsThatAreSetAnew) {
    for (const float norm : {1.0f, NAN}) {
        State s(100), zeroed(100);
        const std::vector<float> grad = s.grad;
        AdamWParameter p = s.parameter();
        p.keep_grad = true;
        adamw_step(make_cpu_exec(2), AdamWTable(make_cpu_exec(2), {p}), {}, {Rates{}.values({}).data(), {3}},
                   {&norm, {1}});
        zeroed.step(make_cpu_exec(2), {}, {}, norm);
        EXPECT_EQ(s.grad, grad);
        EXPECT_EQ(s.param, zeroed.param);
        EXPECT_EQ(zeroed.grad, std::vector<float>(100, 0.0f));
    }
}

TEST(AdamW, RoundedCopy) {
    const Exec ex = make_cpu_exec(2);
    for (const int64_t count : {1, 17, 40000}) {
        State s(count), plain(count);
        std::vector<bf16> rounded = test::nan_vector<bf16>(count + 1);
        AdamWParameter p = s.parameter();
        p.rounded = {rounded.data(), {count}};
        const float norm = 1.0f;
        adamw_step(ex, AdamWTable(ex, {p}), {}, {Rates{}.values({}).data(), {3}}, {&norm, {1}});
        plain.step(ex, {}, {});
        EXPECT_EQ(s.param, plain.param);
        for (size_t i = 0; i < s.param.size(); ++i) ASSERT_EQ(rounded[i].bits, bf16(s.param[i]).bits);
        EXPECT_TRUE(std::isnan(static_cast<float>(rounded.back())));
    }
}

TEST(AdamW, SameBytesOnAnyThreads) {
    State one(100000), many(100000);
    one.step(make_cpu_exec(1), {}, {});
    many.step(make_cpu_exec(5), {}, {});
    EXPECT_EQ(one.param, many.param);
    EXPECT_EQ(one.v, many.v);
}

TEST(GradientNorm, IsThatOfAllParameters) {
    State a(1000), b(0), c(33333);
    c.grad[7] = 100.0f;
    double sum = 0;
    for (const State* s : {&a, &b, &c})
        for (const float g : s->grad) sum += double{g} * double{g};
    for (const int threads : {1, 3}) {
        const Exec ex = make_cpu_exec(threads);
        const AdamWTable table(ex, {a.parameter(), b.parameter(), c.parameter()});
        float norm = NAN;
        gradient_norm(ex, table, {&norm, {1}});
        EXPECT_EQ(norm, static_cast<float>(std::sqrt(sum)));
    }
    c.grad[5] = NAN;
    const Exec ex = make_cpu_exec(1);
    float norm = 0;
    gradient_norm(ex, AdamWTable(ex, {a.parameter(), c.parameter()}), {&norm, {1}});
    EXPECT_TRUE(std::isnan(norm));
}

TEST(SquaredNorm, MatchesReferenceAndDoesNotDependOnThreads) {
    test::for_each_target([] {
        for (const int64_t n : {0, 1, 7, 16383, 16384, 16385, 200001}) {
            Random random(5);
            const std::vector<float> x = random.vector(n + 1, -3, 3);
            double expected = 0;
            for (size_t i = 1; i < x.size(); ++i) expected += double{x[i]} * double{x[i]};
            const double one = cpu::squared_norm(make_cpu_exec(1), n, x.data() + 1);
            EXPECT_NEAR(one, expected, 1e-12 * expected) << n;
            for (const int threads : {2, 3, 7})
                EXPECT_EQ(cpu::squared_norm(make_cpu_exec(threads), n, x.data() + 1), one) << n;
        }
    });
}

TEST(SquaredNorm, KeepsNanAndOverflowsOnlyInF64) {
    std::vector<float> x(100, 1e30f);
    EXPECT_NEAR(cpu::squared_norm(make_cpu_exec(1), 100, x.data()), 1e62, 1e55);
    x[42] = NAN;
    EXPECT_TRUE(std::isnan(cpu::squared_norm(make_cpu_exec(1), 100, x.data())));
}

TEST(AdamW, Errors) {
    const Exec ex = make_cpu_exec(1);
    State s(4);
    const auto run = [&](const AdamWOptions& o) { s.step(ex, o, {}); };
    expect_error("[adamw_step] beta1 must be in [0, 1) but is 1", [&] { run({.beta1 = 1}); });
    expect_error("[adamw_step] beta2 must be in [0, 1) but is -0.5", [&] { run({.beta2 = -0.5f}); });
    expect_error("[adamw_step] eps must be finite and >= 0 but is -1", [&] { run({.eps = -1}); });
    expect_error("[adamw_step] clip must be finite and >= 0 but is inf", [&] { run({.clip = INFINITY}); });
    s.weight_decay = -1;
    expect_error("[adamw] weight_decay must be finite and >= 0 but is -1", [&] { run({}); });
    s.weight_decay = 0;
    AdamWParameter p = s.parameter();
    p.m = {s.m.data(), {3}};
    expect_error("[adamw] `m` must be [count] = [4] but is [3]", [&] { AdamWTable(ex, {p}); });
    p.m = {s.m.data(), {4}, 2};
    expect_error("[adamw] arguments must be dense", [&] { AdamWTable(ex, {p}); });
    const AdamWTable table(ex, {s.parameter()});
    const std::vector<float> two(2, 1.0f);
    expect_error("[adamw_step] `rates` must be [3] = [3] but is [2]", [&] {
        adamw_step(ex, table, {}, {two.data(), {2}}, {two.data(), {1}});
    });
    expect_error("[gradient_norm] `norm` must be [1] = [1] but is absent",
                 [&] { gradient_norm(ex, table, {}); });
}

}  // namespace
}  // namespace ssm
