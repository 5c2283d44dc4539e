// The loss of a linear head on a GPU against f64 loops and the CPU operator; tiles, ignored and impossible
// targets, NaN and infinite logits.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
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
        std::vector<double> logits(size(c.v), 0.0);
        for (int64_t j = 0; j < c.v; ++j)
            for (int64_t k = 0; k < c.e; ++k)
                logits[size(j)] += static_cast<double>(c.hidden[size(i * c.e + k)]) *
                                   static_cast<double>(c.weight[size(j * c.e + k)]);
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (const double x : logits) sum += std::exp(x - most);
        r.nll.push_back(most + std::log(sum) - logits[size(target)]);
        const auto g = static_cast<double>(c.grad_nll[size(i)]);
        for (int64_t j = 0; j < c.v; ++j) {
            const double d = g * (std::exp(logits[size(j)] - most) / sum - (j == target ? 1.0 : 0.0));
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

// `apart`: columns between the rows of everything. tile_bytes 0: through the operator's front.
Got backward(const Exec& ex, const Case& c, int64_t apart = 0, int64_t tile_bytes = 0,
             float start = kGradientStart) {
    const auto spread = [&](const std::vector<float>& v, int64_t rows) {
        const Tensor wide = on_device(nan_vector(rows * (c.e + apart)), {rows, c.e + apart}, ex);
        const Tensor inner = wide.columns(0, c.e);
        inner.copy_from(on_device(v, {rows, c.e}, ex));
        return inner;
    };
    const auto started = [&](int64_t n) { return std::vector<float>(static_cast<size_t>(n), start); };
    const Tensor hidden = spread(c.hidden, c.t), weight = spread(c.weight, c.v),
                 grad_hidden = spread(started(c.t * c.e), c.t), grad_weight = spread(started(c.v * c.e), c.v),
                 targets = on_device(c.targets, {c.t}, ex), grad_nll = on_device(c.grad_nll, {c.t}, ex),
                 nll = on_device(nan_vector(c.t), {c.t}, ex);
    if (tile_bytes > 0) {
        cuda::linear_cross_entropy_backward(ex, hidden.view<const float, 2>(), weight.view<const float, 2>(),
                                            targets.view<const int32_t, 1>(), grad_nll.view<const float, 1>(),
                                            nll.view<float, 1>(), grad_hidden.view<float, 2>(),
                                            grad_weight.view<float, 2>(), tile_bytes);
    } else {
        linear_cross_entropy_backward(ex, hidden.view<const float, 2>(), weight.view<const float, 2>(),
                                      targets.view<const int32_t, 1>(), grad_nll.view<const float, 1>(),
                                      nll.view<float, 1>(), grad_hidden.view<float, 2>(),
                                      grad_weight.view<float, 2>());
    }
    return {from_device<float>(nll), from_device<float>(grad_hidden), from_device<float>(grad_weight)};
}

const std::vector<std::array<int64_t, 3>> kSizes = {
    {1, 1, 1},     {1, 7, 5},     {9, 8, 31},    {17, 5, 32},    {5, 3, 33},
    {30, 33, 300}, {7, 16, 4096}, {40, 4, 4097}, {9, 12, 16384}, {12, 8, 16391}};

void check_forward(const Case& c, DType type, int64_t tile_bytes) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " e " << c.e << " v " << c.v << " " << name_of(type)
                                    << " tile " << tile_bytes);
    const Exec& ex = cuda_exec();
    Case seen = c;
    if (type == DType::bf16) {
        for (float& x : seen.hidden) x = static_cast<float>(bf16(x));
        for (float& x : seen.weight) x = static_cast<float>(bf16(x));
    }
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

TEST(LinearCrossEntropyCuda, GradientsMatchReference) {
    for (const auto& [t, e, v] : kSizes) {
        for (const auto precision : {MatmulPrecision::f32, MatmulPrecision::bf16}) {
            for (const int64_t apart : {0, 3}) {
                for (const int64_t tile_bytes : {int64_t{0}, 4 * 4 * ((v + 7) / 8 * 8)}) {
                    SCOPED_TRACE(testing::Message() << "t " << t << " e " << e << " v " << v << " apart "
                                                    << apart << " tile " << tile_bytes);
                    Exec ex = cuda_exec();
                    ex.matmul = precision;
                    const double tolerance = precision == MatmulPrecision::bf16 ? 2e-2 : 1e-5;
                    const Case c(t, e, v);
                    const float start = apart > 0 ? kGradientStart : 0.0f;  // 0: small gradients show
                    const Got got = backward(ex, c, apart, tile_bytes, start);
                    const Result want = reference(c, start);
                    expect_close(got.nll, want.nll, tolerance, "nll");
                    expect_close(got.grad_hidden, want.grad_hidden, tolerance, "grad_hidden");
                    expect_close(got.grad_weight, want.grad_weight, tolerance, "grad_weight");
                }
            }
        }
    }
}

// Tiles of several blocks of 128 tokens, and a remnant.
TEST(LinearCrossEntropyCuda, ManyTilesMatchTheCpu) {
    const Case c(700, 16, 200);
    const Exec cpu = make_cpu_exec(2);
    const Got want = backward(cpu, c, 0, 0, 0.0f), got = backward(cuda_exec(), c, 0, 300 * 4 * 200, 0.0f);
    expect_close(got.nll, want.nll, 1e-5, "nll");
    expect_close(got.grad_hidden, want.grad_hidden, 1e-5, "grad_hidden");
    expect_close(got.grad_weight, want.grad_weight, 1e-5, "grad_weight");
}

// Logits far apart: e^(x - max) underflows, nothing overflows; and a small loss keeps its digits.
TEST(LinearCrossEntropyCuda, LargeLogits) {
    const Case c(20, 3, 5000, 400.0f);
    const Got got = backward(cuda_exec(), c, 0, 0, 0.0f);
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
