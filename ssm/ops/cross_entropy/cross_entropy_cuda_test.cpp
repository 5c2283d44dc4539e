// The loss of a linear head on a GPU against f64 loops and the CPU operator; tiles, ignored and impossible
// targets, NaN and infinite logits.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
#include "ssm/ops/cross_entropy/cross_entropy_reference.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using namespace test;

struct Case {
    int64_t t, e, v;
    std::vector<float> hidden, weight, grad_nll;
    std::vector<int32_t> targets;

    Case(int64_t t_, int64_t e_, int64_t v_, float scale = 2.0f) : t(t_), e(e_), v(v_) {
        Random random(static_cast<uint64_t>(t + 10 * e + 100 * v));
        hidden = random.vector(t * e, -scale, scale);
        weight = random.vector(v * e);
        grad_nll = random.vector(t);
        for (int64_t i = 0; i < t; ++i) targets.push_back(static_cast<int32_t>(random.integer(-1, v - 1)));
    }
};

struct Result {
    std::vector<double> nll, grad_hidden, grad_weight;
};

// In f64, from hidden and weight as given; gradients are added to `start`.
Result reference(const Case& c, float start_at = kGradientStart) {
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const auto start = static_cast<double>(start_at);
    Result r{{}, std::vector<double>(size(c.t * c.e), start), std::vector<double>(size(c.v * c.e), start)};
    for (int64_t i = 0; i < c.t; ++i) {
        const int32_t target = c.targets[size(i)];
        if (target < 0 || target >= c.v) {
            r.nll.push_back(target < 0 ? 0.0 : static_cast<double>(NAN));
            continue;
        }
        const TokenLoss token(&c.hidden[size(i * c.e)], c.weight.data(), c.v, c.e);
        r.nll.push_back(token.nll(target));
        for (int64_t j = 0; j < c.v; ++j) {
            const double d = static_cast<double>(c.grad_nll[size(i)]) * token.gradient(j, target);
            for (int64_t k = 0; k < c.e; ++k) {
                r.grad_hidden[size(i * c.e + k)] += d * static_cast<double>(c.weight[size(j * c.e + k)]);
                r.grad_weight[size(j * c.e + k)] += d * static_cast<double>(c.hidden[size(i * c.e + k)]);
            }
        }
    }
    return r;
}

struct Got {
    std::vector<float> nll, grad_hidden, grad_weight;
};

// What the operator sees when its inputs are bf16.
Case rounded(Case c) {
    for (auto* v : {&c.hidden, &c.weight})
        for (float& x : *v) x = static_cast<float>(bf16(x));
    return c;
}

// `apart`: columns between the rows of everything. tile_bytes 0: through the operator's front.
struct How {
    int64_t apart = 0, tile_bytes = 0;
    float start = kGradientStart;
    DType hidden = DType::f32, weight = DType::f32;
    bool set_hidden = false, set_weight = false;
};

Got backward(const Exec& ex, const Case& c, const How& how = {}) {
    const auto spread = [&](const std::vector<float>& v, int64_t rows, DType dtype) {
        const int64_t width = c.e + how.apart;
        if (dtype == DType::bf16) {
            const Tensor wide = on_device(to_bf16(nan_vector(rows * width)), {rows, width}, ex);
            wide.columns(0, c.e).copy_from(on_device(to_bf16(v), {rows, c.e}, ex));
            return wide.columns(0, c.e);
        }
        const Tensor wide = on_device(nan_vector(rows * width), {rows, width}, ex);
        wide.columns(0, c.e).copy_from(on_device(v, {rows, c.e}, ex));
        return wide.columns(0, c.e);
    };
    const auto started = [&](int64_t n, bool set) {
        return set ? nan_vector(n) : std::vector<float>(static_cast<size_t>(n), how.start);
    };
    const Tensor hidden = spread(c.hidden, c.t, how.hidden), weight = spread(c.weight, c.v, how.weight),
                 grad_hidden = spread(started(c.t * c.e, how.set_hidden), c.t, how.hidden),
                 grad_weight = spread(started(c.v * c.e, how.set_weight), c.v, DType::f32),
                 targets = on_device(c.targets, {c.t}, ex), grad_nll = on_device(c.grad_nll, {c.t}, ex),
                 nll = on_device(nan_vector(c.t), {c.t}, ex);
    const auto ids = targets.view<const int32_t, 1>();
    const auto g = grad_nll.view<const float, 1>();
    if (how.tile_bytes > 0) {
        cuda::linear_cross_entropy_backward(ex,
                                            {hidden,
                                             weight,
                                             ids,
                                             g,
                                             nll.view<float, 1>(),
                                             grad_hidden,
                                             grad_weight.view<float, 2>(),
                                             {how.set_hidden, how.set_weight}},
                                            how.tile_bytes);
    } else {
        linear_cross_entropy_backward(ex, hidden, weight, ids, g, nll.view<float, 1>(), grad_hidden,
                                      grad_weight.view<float, 2>(), {how.set_hidden, how.set_weight});
    }
    Got got{from_device<float>(nll), {}, from_device<float>(grad_weight)};
    if (how.hidden == DType::bf16) {
        for (const bf16 x : from_device<bf16>(grad_hidden)) got.grad_hidden.push_back(static_cast<float>(x));
    } else {
        got.grad_hidden = from_device<float>(grad_hidden);
    }
    return got;
}

const std::vector<std::array<int64_t, 3>> kSizes = {
    {1, 1, 1},      {1, 7, 5},     {9, 8, 31},    {17, 5, 32},    {5, 3, 33},
    {30, 33, 300},  {7, 16, 4096}, {40, 4, 4097}, {9, 12, 16384}, {12, 8, 16391},
    {290, 2, 9001}, {3, 3, 57344}, {3, 3, 57345}};

void check_forward(const Case& c, DType type, int64_t tile_bytes) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " e " << c.e << " v " << c.v << " " << name_of(type)
                                    << " tile " << tile_bytes);
    const Exec& ex = cuda_exec();
    const Case seen = type == DType::bf16 ? rounded(c) : c;
    const Tensor hidden = type == DType::bf16 ? on_device(to_bf16(c.hidden), {c.t, c.e})
                                              : on_device(c.hidden, {c.t, c.e}),
                 weight = type == DType::bf16 ? on_device(to_bf16(c.weight), {c.v, c.e})
                                              : on_device(c.weight, {c.v, c.e}),
                 targets = on_device(c.targets, {c.t}), nll = on_device(nan_vector(c.t), {c.t});
    if (tile_bytes > 0)
        cuda::linear_cross_entropy(ex, hidden, PackedWeight(weight), targets.view<const int32_t, 1>(),
                                   nll.view<float, 1>(), tile_bytes);
    else
        linear_cross_entropy(ex, hidden, PackedWeight(weight), targets.view<const int32_t, 1>(),
                             nll.view<float, 1>());
    expect_close(from_device<float>(nll), reference(seen).nll, 3e-6, "nll");
}

TEST(LinearCrossEntropyCuda, MatchesReference) {
    for (const auto& [t, e, v] : kSizes) {
        for (const DType type : {DType::f32, DType::bf16}) {
            check_forward(Case(t, e, v), type, 0);
            check_forward(Case(t, e, v), type, 3 * 4 * ((v + 7) / 8 * 8));  // tiles of 3 tokens
        }
    }
}

void check_gradients(const Case& c, const How& how, MatmulPrecision precision) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " e " << c.e << " v " << c.v << " apart " << how.apart
                                    << " tile " << how.tile_bytes << " hidden " << name_of(how.hidden)
                                    << " weight " << name_of(how.weight));
    Exec ex = cuda_exec();
    ex.matmul = precision;
    const bool low =
        precision == MatmulPrecision::bf16 || how.hidden == DType::bf16 || how.weight == DType::bf16;
    const Got got = backward(ex, c, how);
    const Result want = reference(low ? rounded(c) : c, how.start);
    const double tolerance = low ? 2e-2 : 1e-5;
    expect_close(got.nll, want.nll, low ? 2e-5 : 1e-5, "nll");
    std::vector<double> want_hidden = want.grad_hidden;
    for (double& x : want_hidden) x -= how.set_hidden ? static_cast<double>(how.start) : 0.0;
    expect_close(got.grad_hidden, want_hidden, tolerance, "grad_hidden");
    std::vector<double> want_weight = want.grad_weight;
    for (double& x : want_weight) x -= how.set_weight ? static_cast<double>(how.start) : 0.0;
    expect_close(got.grad_weight, want_weight, tolerance, "grad_weight");
}

TEST(LinearCrossEntropyCuda, GradientsMatchReference) {
    for (const auto& [t, e, v] : kSizes) {
        const Case c(t, e, v);
        const int64_t tile = 4 * 4 * ((v + 7) / 8 * 8);  // tiles of 4 tokens
        for (const int64_t apart : {0, 3, 8}) {
            const float start = apart > 0 ? kGradientStart : 0.0f;  // 0: small gradients show
            for (const int64_t tile_bytes : {int64_t{0}, tile}) {
                How how{.apart = apart,
                        .tile_bytes = tile_bytes,
                        .start = start,
                        .set_hidden = apart == 8,
                        .set_weight = apart != 3};
                check_gradients(c, how, MatmulPrecision::f32);
                check_gradients(c, how, MatmulPrecision::bf16);
                how.hidden = DType::bf16;
                if (apart == 3) check_gradients(rounded(c), how, MatmulPrecision::f32);
                how.weight = DType::bf16;
                check_gradients(c, how, MatmulPrecision::f32);
            }
        }
    }
}

TEST(MeanNllCuda, MatchesF64) {
    for (const int64_t t : {0, 1, 31, 1023, 1025, 40000}) {
        const auto nll = Random(2).vector(t, 0.0f, 20.0f);
        double sum = 0;
        for (const float x : nll) sum += static_cast<double>(x);
        const Tensor there = on_device(nll, {t}), mean = on_device(nan_vector(1), {1});
        mean_nll(cuda_exec(), t > 0 ? there.view<const float, 1>() : View<const float, 1>(), 7.0,
                 mean.view<float, 1>());
        EXPECT_NEAR(mean.item(), static_cast<float>(sum / 7.0), 1e-7 * sum) << t;
    }
}

// Tiles of several blocks of 128 tokens, and a remnant.
TEST(LinearCrossEntropyCuda, ManyTilesMatchTheCpu) {
    const Case c(700, 16, 200);
    const Exec cpu = make_cpu_exec(2);
    const Got want = backward(cpu, c, {.start = 0.0f}),
              got = backward(cuda_exec(), c, {.tile_bytes = 300 * 4 * 200, .start = 0.0f});
    expect_close(got.nll, want.nll, 1e-5, "nll");
    expect_close(got.grad_hidden, want.grad_hidden, 1e-5, "grad_hidden");
    expect_close(got.grad_weight, want.grad_weight, 1e-5, "grad_weight");
}

// Logits far apart: e^(x - max) underflows, nothing overflows; and a small loss keeps its digits.
TEST(LinearCrossEntropyCuda, LargeLogits) {
    const Case c(20, 3, 5000, 400.0f);
    const Got got = backward(cuda_exec(), c, {.start = 0.0f});
    const Result want = reference(c, 0.0f);
    expect_close(got.nll, want.nll, 1e-5, "nll");
    expect_close(got.grad_weight, want.grad_weight, 1e-4, "grad_weight");
}

// A target past the vocabulary: NaN and no gradient. A logit that is NaN or infinite: NaN in its row alone.
TEST(LinearCrossEntropyCuda, WhatCannotBe) {
    for (const int64_t v : {6, 5000}) {
        Case c(6, 1, v, 1.0f);
        c.targets = {0, static_cast<int32_t>(v), 2, -1, 1, 3};
        c.hidden = {1, 1, NAN, NAN, 1e30f, -1};
        for (float& w : c.weight) w = 0.5f;
        c.weight[4] = 1e30f;  // row 4: one logit is +inf; row 5: one is -1e30
        const Got got = backward(cuda_exec(), c);
        const auto same = [&](size_t i) { return got.nll[i]; };
        EXPECT_NEAR(same(0), 1e30f, 1e24f);
        EXPECT_TRUE(std::isnan(same(1)));
        EXPECT_TRUE(std::isnan(same(2)));
        EXPECT_EQ(same(3), 0.0f);
        EXPECT_TRUE(std::isnan(same(4)));
        EXPECT_NEAR(same(5), std::log(static_cast<float>(v - 1)), 1e-4f);
        EXPECT_EQ(got.grad_hidden[1], kGradientStart);
        EXPECT_TRUE(std::isnan(got.grad_hidden[2]));
        EXPECT_EQ(got.grad_hidden[3], kGradientStart);
        EXPECT_TRUE(std::isnan(got.grad_hidden[4]));
        EXPECT_TRUE(std::isfinite(got.grad_hidden[5]));
    }
}

// Minus infinity masks an entry: weight 0 there, and lanes that see nothing else do not spoil the sum.
TEST(LinearCrossEntropyCuda, MaskedEntries) {
    const int64_t v = 9000;
    Case c(1, 1, v);
    c.hidden = {1.0f};
    c.targets = {4444};
    for (float& w : c.weight) w = -INFINITY;
    c.weight[4444] = 3.0f;
    c.weight[17] = 3.0f;
    const Tensor hidden = on_device(c.hidden, {1, 1}), weight = on_device(c.weight, {v, 1}),
                 targets = on_device(c.targets, {1}), nll = on_device(nan_vector(1), {1});
    linear_cross_entropy(cuda_exec(), hidden, PackedWeight(weight), targets.view<const int32_t, 1>(),
                         nll.view<float, 1>());
    EXPECT_NEAR(from_device<float>(nll)[0], std::log(2.0f), 1e-6f);
}

}  // namespace
}  // namespace ssm
