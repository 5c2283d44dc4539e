#include "ssm/ops/linear/linear.h"

#include <gtest/gtest.h>

#include <thread>

#include "ssm/core/parallel.h"
#include "ssm/ops/linear/linear_impl.h"
#include "ssm/ops/linear/linear_reference.h"
#include "ssm/ops/linear/linear_test.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using namespace test;
using linear_detail::Product;

class LinearOfTypes : public testing::TestWithParam<LinearTypes> {};
INSTANTIATE_TEST_SUITE_P(All, LinearOfTypes, testing::ValuesIn(kLinearTypes),
                         [](const auto& types) { return name_of(types.param); });

TEST_P(LinearOfTypes, MatchesReference) {
    const auto [x_type, w_type, y_type] = GetParam();
    Random random(1);
    const Exec ex = make_cpu_exec(2);
    const int64_t sizes[][2] = {{1, 1}, {3, 5}, {48, 7}, {33, 21}, {257, 130}};  // i, o
    for (const auto [i, o] : sizes) {
        const TestMatrix w = random_matrix(random, o, i, w_type, 0);
        const std::vector<float> bias = random.vector(o);
        const PackedWeight packed(w.tensor);
        for (const int64_t t : {0, 1, 2, 3, 4, 5, 8, 9, 33}) {
            for (const int64_t variant : {t % 2, 3 - t % 2}) {  // plain and packed
                const bool with_bias = variant % 2 == 1, use_packed = variant >= 2;
                const TestMatrix x = random_matrix(random, t, i, x_type, variant);
                const TestMatrix y(t, o, y_type, 2 * variant);
                const View<const float, 1> b =
                    with_bias ? View<const float, 1>(bias.data(), {o}) : View<const float, 1>();
                if (use_packed)
                    linear(ex, x.tensor, packed, b, y.tensor);
                else
                    linear(ex, x.tensor, w.tensor, b, y.tensor);
                const auto want =
                    reference_linear(x.values(), w.values(), with_bias ? bias : std::vector<float>{}, t, i, o,
                                     w_type == DType::bf16);
                const double tolerance = y_type == DType::bf16 ? 5e-3 : 1e-6;
                EXPECT_LE(relative_l2(y.values(), want), tolerance)
                    << "t " << t << " i " << i << " o " << o << " variant " << variant;
                EXPECT_TRUE(y.gaps_untouched());
            }
        }
    }
}

TEST_P(LinearOfTypes, StepsFoldToSequence) {
    const auto [x_type, w_type, y_type] = GetParam();
    Random random(2);
    const Exec ex = make_cpu_exec(2);
    const int64_t t = 37, i = 100, o = 50;
    const TestMatrix w = random_matrix(random, o, i, w_type, 0), x = random_matrix(random, t, i, x_type, 3);
    const PackedWeight packed(w.tensor);
    const TestMatrix whole(t, o, y_type, 0);
    linear(ex, x.tensor, packed, {}, whole.tensor);
    for (const int64_t chunk : {1, 3, 8, 20}) {
        const TestMatrix parts(t, o, y_type, 0);
        for (int64_t at = 0; at < t; at += chunk) {
            const int64_t end = std::min(t, at + chunk);
            linear(ex, x.tensor.rows(at, end), packed, {}, parts.tensor.rows(at, end));
        }
        EXPECT_LE(relative_l2(parts.values(), whole.values()), y_type == DType::bf16 ? 1e-3 : 1e-6) << chunk;
    }
}

TEST_P(LinearOfTypes, ThreadsDoNotChangeTheRows) {
    const auto [x_type, w_type, y_type] = GetParam();
    Random random(3);
    const TestMatrix w = random_matrix(random, 203, 300, w_type, 0);
    const PackedWeight packed(w.tensor);
    for (const int64_t t : {1, 6, 40}) {
        const TestMatrix x = random_matrix(random, t, 300, x_type, 0);
        std::vector<float> first;
        for (const int threads : {1, 2, 3, 2}) {
            const TestMatrix y(t, 203, y_type, 0);
            linear(make_cpu_exec(threads), x.tensor, packed, {}, y.tensor);
            if (first.empty()) first = y.values();
            EXPECT_EQ(y.values(), first) << "t " << t << ", threads " << threads;
        }
    }
}

TEST(Linear, EmptyReductionGivesTheBias) {
    const Exec ex = make_cpu_exec(2);
    const std::vector<float> bias{1.0f, -2.0f, 3.0f};
    for (const int64_t t : {2, 20}) {
        const TestMatrix x(t, 0, DType::f32, 1), w(3, 0, DType::f32, 0), y(t, 3, DType::f32, 1);
        linear(ex, x.tensor, w.tensor, View<const float, 1>(bias.data(), {3}), y.tensor);
        for (int64_t r = 0; r < t; ++r) EXPECT_EQ(y.view()(r, 2), 3.0f);
        EXPECT_TRUE(y.gaps_untouched());
    }
}

TEST(Linear, NanAndInfShow) {
    Random random(4);
    const Exec ex = make_cpu_exec(2);
    for (const DType type : {DType::f32, DType::bf16}) {
        const TestMatrix w = random_matrix(random, 20, 40, type, 0);
        for (const int64_t t : {3, 30}) {
            const TestMatrix x = random_matrix(random, t, 40, DType::f32, 0), y(t, 20, DType::f32, 0);
            x.view()(1, 39) = NAN;
            x.view()(2, 0) = INFINITY;
            linear(ex, x.tensor, w.tensor, {}, y.tensor);
            for (int64_t o = 0; o < 20; ++o) {
                EXPECT_TRUE(std::isfinite(y.view()(0, o)));
                EXPECT_TRUE(std::isnan(y.view()(1, o)));
                EXPECT_TRUE(std::isinf(y.view()(2, o)));
            }
        }
    }
}

TEST(Linear, OnePackedWeightServesManyThreads) {
    Random random(5);
    const TestMatrix w = random_matrix(random, 96, 64, DType::f32, 0);
    const PackedWeight packed(w.tensor);
    std::vector<TestMatrix> xs, ys;
    for (int j = 0; j < 6; ++j) {
        xs.push_back(random_matrix(random, 10 + 7 * (j % 3), 64, DType::f32, 0));
        ys.emplace_back(xs.back().rows, 96, DType::f32, 0);
    }
    std::vector<std::thread> threads;
    for (size_t j = 0; j < xs.size(); ++j) {
        threads.emplace_back([&, j] {
            const Exec ex = make_cpu_exec(1);
            for (int repeat = 0; repeat < 20; ++repeat) linear(ex, xs[j].tensor, packed, {}, ys[j].tensor);
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t j = 0; j < xs.size(); ++j) {
        expect_close(ys[j].values(),
                     reference_linear(xs[j].values(), w.values(), {}, xs[j].rows, 64, 96, false), 1e-6, "y");
    }
}

TEST(Linear, ReducedPrecisionRoundsTheInputs) {
    Random random(6);
    Exec ex = make_cpu_exec(2);
    ex.matmul = MatmulPrecision::bf16;
    if (!linear_detail::products_run_in_bf16()) GTEST_SKIP() << "no fast bf16 here";
    const TestMatrix x = random_matrix(random, 50, 70, DType::f32, 2),
                     w = random_matrix(random, 30, 70, DType::f32, 0);
    const TestMatrix y(50, 30, DType::f32, 0);
    linear(ex, x.tensor, w.tensor, {}, y.tensor);
    expect_close(y.values(), reference_linear(x.values(), w.values(), {}, 50, 70, 30, true), 1e-6, "y");
}

// --- backward -----------------------------------------------------------------------------------------

class LinearBackward : public testing::TestWithParam<MatmulPrecision> {};
INSTANTIATE_TEST_SUITE_P(All, LinearBackward, testing::Values(MatmulPrecision::f32, MatmulPrecision::bf16));

// loss = sum_t,o grad_y[t,o] y[t,o] has the gradients that linear_backward computes.
TEST_P(LinearBackward, GradientsMatchFiniteDifferences) {
    Random random(7);
    Exec ex = make_cpu_exec(2);
    ex.matmul = GetParam();
    for (const auto [t, i, o] : std::vector<std::array<int64_t, 3>>{{1, 3, 2}, {5, 7, 4}, {12, 5, 17}}) {
        const TestMatrix x = random_matrix(random, t, i, DType::f32, 2),
                         g = random_matrix(random, t, o, DType::f32, 3),
                         w = random_matrix(random, o, i, DType::f32, 1);
        const TestMatrix grad_x(t, i, DType::f32, 4), grad_w(o, i, DType::f32, 0);
        grad_x.fill(std::vector<float>(static_cast<size_t>(t * i), kGradientStart));
        grad_w.fill(std::vector<float>(static_cast<size_t>(o * i), kGradientStart));
        std::vector<float> grad_b(static_cast<size_t>(o), kGradientStart);
        linear_backward(ex, g.tensor, x.tensor, w.tensor, grad_x.tensor, grad_w.view(),
                        View<float, 1>(grad_b.data(), {o}));
        auto xd = to_double(x.values()), wd = to_double(w.values()), gd = to_double(g.values());
        std::vector<double> bd(static_cast<size_t>(o), 0.25);
        const auto loss = [&, t = t, i = i, o = o] {
            double sum = 0;
            for (int64_t a = 0; a < t; ++a)
                for (int64_t b = 0; b < o; ++b) {
                    double y = bd[static_cast<size_t>(b)];
                    for (int64_t c = 0; c < i; ++c)
                        y += xd[static_cast<size_t>(a * i + c)] * wd[static_cast<size_t>(b * i + c)];
                    sum += gd[static_cast<size_t>(a * o + b)] * y;
                }
            return sum;
        };
        const double tolerance = GetParam() == MatmulPrecision::bf16 ? 1e-2 : 1e-6;
        expect_close(added(grad_x.values()), finite_differences(xd, loss), tolerance, "grad_x");
        expect_close(added(grad_w.values()), finite_differences(wd, loss), tolerance, "grad_weight");
        expect_close(added(grad_b), finite_differences(bd, loss), 1e-6, "grad_bias");
        EXPECT_TRUE(grad_x.gaps_untouched() && grad_w.gaps_untouched());
    }
}

TEST_P(LinearBackward, RunsTwiceToTheSameBytesAtLength2048) {
    Random random(8);
    Exec ex = make_cpu_exec(2);
    ex.matmul = GetParam();
    const int64_t t = 2048, i = 33, o = 70;
    const TestMatrix x = random_matrix(random, t, i, DType::f32, 0),
                     g = random_matrix(random, t, o, DType::f32, 0),
                     w = random_matrix(random, o, i, DType::f32, 0);
    std::vector<float> first;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const Tensor grad_x = Tensor::zeros({t, i}), grad_w = Tensor::zeros({o, i}),
                     grad_b = Tensor::zeros({o});
        linear_backward(ex, g.tensor, x.tensor, w.tensor, grad_x, grad_w.view<float, 2>(),
                        grad_b.view<float, 1>());
        std::vector<float> all(grad_x.data<float>(), grad_x.data<float>() + t * i);
        all.insert(all.end(), grad_w.data<float>(), grad_w.data<float>() + o * i);
        all.insert(all.end(), grad_b.data<float>(), grad_b.data<float>() + o);
        if (first.empty()) first = all;
        EXPECT_EQ(all, first);
    }
    std::vector<double> sums(static_cast<size_t>(o), 0.0);
    const std::vector<float> gv = g.values();
    for (size_t k = 0; k < gv.size(); ++k) sums[k % static_cast<size_t>(o)] += static_cast<double>(gv[k]);
    expect_close(std::vector<float>(first.end() - o, first.end()), sums, 1e-5, "grad_bias");
}

TEST(LinearBackwardParts, AbsentGradientsAreNotNeeded) {
    Random random(9);
    const Exec ex = make_cpu_exec(1);
    const TestMatrix x = random_matrix(random, 6, 4, DType::f32, 0),
                     g = random_matrix(random, 6, 3, DType::f32, 0),
                     w = random_matrix(random, 3, 4, DType::f32, 0);
    const Tensor whole = Tensor::zeros({3, 4}), alone = Tensor::zeros({3, 4}), grad_x = Tensor::zeros({6, 4});
    linear_backward(ex, g.tensor, x.tensor, w.tensor, grad_x, whole.view<float, 2>(), {});
    linear_backward(ex, g.tensor, x.tensor, w.tensor, {}, alone.view<float, 2>(), {});
    for (int64_t k = 0; k < 12; ++k) EXPECT_EQ(alone.data<float>()[k], whole.data<float>()[k]);
    linear_backward(ex, g.tensor, x.tensor, w.tensor, {}, {}, {});
}

// The large sizes take the other kernel of oneDNN.
TEST(LinearBackwardParts, GradientsAreSetWhereAsked) {
    Random random(9);
    const Exec ex = make_cpu_exec(2);
    for (const int64_t t : {0, 6, 4096}) {
        const int64_t i = 40, o = 33;
        const TestMatrix x = random_matrix(random, t, i, DType::f32, 0),
                         g = random_matrix(random, t, o, DType::f32, 0),
                         w = random_matrix(random, o, i, DType::f32, 0);
        const Tensor x_sum = Tensor::zeros({t, i}), w_sum = Tensor::zeros({o, i}),
                     x_set = Tensor::empty({t, i}), w_set = Tensor::empty({o, i});
        std::fill_n(x_set.data<float>(), t * i, NAN);
        std::fill_n(w_set.data<float>(), o * i, NAN);
        linear_backward(ex, g.tensor, x.tensor, w.tensor, x_sum, w_sum.view<float, 2>(), {});
        linear_backward(ex, g.tensor, x.tensor, w.tensor, x_set, w_set.view<float, 2>(), {},
                        {.x = true, .weight = true});
        for (int64_t k = 0; k < t * i; ++k) ASSERT_EQ(x_set.data<float>()[k], x_sum.data<float>()[k]);
        for (int64_t k = 0; k < o * i; ++k) ASSERT_EQ(w_set.data<float>()[k], w_sum.data<float>()[k]);
    }
}

// --- matmul, and the product without oneDNN -----------------------------------------------------------

std::vector<double> reference_matmul(const TestMatrix& a, const TestMatrix& b, const std::vector<float>& c,
                                     const MatmulOptions& options) {
    const auto av = a.values(), bv = b.values();
    const int64_t m = options.transpose_a ? a.columns : a.rows, k = options.transpose_a ? a.rows : a.columns;
    const int64_t n = options.transpose_b ? b.rows : b.columns;
    auto out = reference_product(m, n, k, {av, a.columns, options.transpose_a},
                                 {bv, b.columns, options.transpose_b});
    for (size_t i = 0; i < out.size(); ++i) {
        const double before = options.beta == 0.0f ? 0.0 : static_cast<double>(c[i]);
        out[i] = static_cast<double>(options.alpha) * out[i] + static_cast<double>(options.beta) * before;
    }
    return out;
}

Product plain_product(const TestMatrix& a, const TestMatrix& b, const TestMatrix& c, const MatmulOptions& o) {
    Product p;
    p.m = c.rows;
    p.n = c.columns;
    p.k = o.transpose_a ? a.rows : a.columns;
    p.a = {a.tensor.raw(), a.tensor.dtype(), a.stride, o.transpose_a};
    p.b = {b.tensor.raw(), b.tensor.dtype(), b.stride, o.transpose_b};
    p.c = c.tensor.raw();
    p.c_dtype = c.tensor.dtype();
    p.c_stride = c.stride;
    p.alpha = o.alpha;
    p.beta = o.beta;
    return p;
}

class Matmul : public testing::TestWithParam<bool> {};  // true: the product without oneDNN
INSTANTIATE_TEST_SUITE_P(All, Matmul, testing::Bool());

TEST_P(Matmul, MatchesReference) {
    Random random(10);
    const std::array<int64_t, 3> sizes[] = {
        {1, 1, 1}, {3, 5, 7}, {13, 33, 300}, {64, 64, 128}, {70, 31, 513}};
    for (const auto [m, n, k] : sizes) {
        for (int variant = 0; variant < 12; ++variant) {
            const MatmulOptions options{
                .transpose_a = variant % 2 == 1,
                .transpose_b = variant / 2 % 2 == 1,
                .alpha = variant < 8 ? 1.0f : -0.5f,
                .beta = std::array{0.0f, 1.0f, 0.75f}[static_cast<size_t>(variant / 4)]};
            const TestMatrix a = options.transpose_a ? random_matrix(random, k, m, DType::f32, 1)
                                                     : random_matrix(random, m, k, DType::f32, 2);
            const TestMatrix b = options.transpose_b ? random_matrix(random, n, k, DType::f32, 0)
                                                     : random_matrix(random, k, n, DType::f32, 3);
            const TestMatrix c(m, n, DType::f32, 5);  // NaN, to be overwritten when beta is 0
            if (options.beta != 0.0f) c.fill(random.vector(m * n));
            const auto want = reference_matmul(a, b, c.values(), options);
            const Exec ex = make_cpu_exec(1 + variant % 3);
            if (GetParam())
                linear_detail::product_plain(ex, plain_product(a, b, c, options));
            else
                matmul(ex, a.view(), b.view(), c.view(), options);
            EXPECT_LE(relative_l2(c.values(), want), 2e-6) << m << " " << n << " " << k << " " << variant;
            EXPECT_TRUE(c.gaps_untouched());
        }
    }
}

TEST_P(Matmul, RunsInsideAParallelRegion) {
    Random random(11);
    const Exec ex = make_cpu_exec(2);
    const int64_t count = 12, n = 40;
    std::vector<TestMatrix> a, b, c;
    for (int64_t j = 0; j < count; ++j) {
        a.push_back(random_matrix(random, n, n + j, DType::f32, 0));
        b.push_back(random_matrix(random, n + j, n, DType::f32, 0));
        c.emplace_back(n, n, DType::f32, 0);
    }
    parallel_for(ex, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            const auto at = static_cast<size_t>(j);
            if (GetParam())
                linear_detail::product_plain(ex, plain_product(a[at], b[at], c[at], {}));
            else
                matmul(ex, a[at].view(), b[at].view(), c[at].view());
        }
    });
    for (size_t j = 0; j < c.size(); ++j) {
        expect_close(c[j].values(), reference_matmul(a[j], b[j], {}, {}), 1e-6, "c");
    }
}

TEST(MatmulDegenerate, EmptyReductionScalesC) {
    const Exec ex = make_cpu_exec(1);
    const TestMatrix a(3, 0, DType::f32, 1), b(0, 2, DType::f32, 0), c(3, 2, DType::f32, 0);
    matmul(ex, View<const float, 2>(c.view().data, {3, 0}, 1), View<const float, 2>(c.view().data, {0, 2}, 2),
           c.view());
    EXPECT_EQ(c.values(), std::vector<float>(6, 0.0f));
    c.fill(std::vector<float>(6, 3.0f));
    matmul(ex, View<const float, 2>(c.view().data, {3, 0}, 1), View<const float, 2>(c.view().data, {0, 2}, 2),
           c.view(), {.beta = 0.5f});
    EXPECT_EQ(c.values(), std::vector<float>(6, 1.5f));
}

TEST(ProductPlain, TakesBf16AndBias) {
    Random random(12);
    const int64_t t = 30, i = 300, o = 45;
    const std::vector<float> bias = random.vector(o);
    for (const DType y_type : {DType::f32, DType::bf16}) {
        const TestMatrix x = random_matrix(random, t, i, DType::bf16, 1),
                         w = random_matrix(random, o, i, DType::bf16, 0), y(t, o, y_type, 2);
        Product p = plain_product(x, w, y, {.transpose_b = true});
        p.bias = bias.data();
        linear_detail::product_plain(make_cpu_exec(2), p);
        expect_close(y.values(), reference_linear(x.values(), w.values(), bias, t, i, o, false),
                     y_type == DType::bf16 ? 5e-3 : 1e-6, "y");
        EXPECT_TRUE(y.gaps_untouched());
    }
}

TEST(ConvertRows, RoundsAsTheStorageTypeDoes) {
    Random random(13);
    std::vector<float> values = random.vector(65, -1e3f, 1e3f);
    values[3] = std::bit_cast<float>(0x7fffffffu);  // a NaN that rounding alone would carry to -0
    values[4] = -INFINITY;
    values[5] = 1.00390625f;    // half way: to even
    values[6] = 3.4028234e38f;  // rounds to infinity
    values[64] = NAN;
    const TestMatrix from(1, 65, DType::f32, 1), to(1, 65, DType::bf16, 1), back(1, 65, DType::f32, 0);
    from.fill(values);
    const Exec ex = make_cpu_exec(1);
    linear_detail::convert_rows(ex, 1, 65, {from.tensor.raw(), DType::f32, 66}, to.tensor.raw(), DType::bf16,
                                66);
    linear_detail::convert_rows(ex, 1, 65, {to.tensor.raw(), DType::bf16, 66}, back.tensor.raw(), DType::f32,
                                65);
    for (int64_t k = 0; k < 65; ++k) {
        const bf16 want(values[static_cast<size_t>(k)]);
        EXPECT_EQ((to.tensor.view<bf16, 2>()(0, k).bits), want.bits) << k;
        EXPECT_EQ(std::bit_cast<uint32_t>(back.view()(0, k)), static_cast<uint32_t>(want.bits) << 16) << k;
    }
}

// --- errors -------------------------------------------------------------------------------------------

TEST(LinearErrors, NameTheArgumentAndItsShape) {
    const Exec ex = make_cpu_exec(1);
    const Tensor x = Tensor::zeros({4, 3}), w = Tensor::zeros({5, 3}), y = Tensor::zeros({4, 5});
    const Tensor bias = Tensor::zeros({4});
    expect_error("[linear] `x` must be [t i] = [any, 3] but is [3, 4]", [&] {
        linear(ex, Tensor::zeros({3, 4}), w, {}, y);
    });
    expect_error("[linear] `y` must be [t o] = [4, 5] but is [4, 3]", [&] { linear(ex, x, w, {}, x); });
    expect_error("[linear] `bias` must be [o] = [5] but is [4]",
                 [&] { linear(ex, x, w, bias.view<const float, 1>(), y); });
    expect_error("[linear] `weight` must be f32 or bf16 but is i32", [&] {
        linear(ex, x, Tensor::zeros({5, 3}, DType::i32), {}, y);
    });
    expect_error("[linear] `y` must be f32 when `x` and `weight` are f32", [&] {
        linear(ex, x, w, {}, Tensor::zeros({4, 5}, DType::bf16));
    });
    expect_error("[linear] `weight` is absent", [&] { linear(ex, x, PackedWeight(), {}, y); });
    expect_error("[linear] `weight` must be dense to be packed", [&] { PackedWeight p(w.columns(0, 2)); });
    expect_error("[linear_backward] `grad_y` must be [t o] = [4, 5] but is [4, 3]",
                 [&] { linear_backward(ex, x, x, w, {}, {}, {}); });
    expect_error("[linear_backward] `grad_weight` must be [o i] = [5, 3] but is [4, 5]",
                 [&] { linear_backward(ex, y, x, w, {}, y.view<float, 2>(), {}); });
    expect_error("[matmul] op(a) is [4, 3] but op(b) is [5, 3]",
                 [&] { matmul(ex, x.view<const float, 2>(), w.view<const float, 2>(), y.view<float, 2>()); });
    expect_error("[matmul] `c` must be [m n] = [4, 5] but is [4, 3]", [&] {
        matmul(ex, x.view<const float, 2>(), w.view<const float, 2>(), x.view<float, 2>(),
               {.transpose_b = true});
    });
}

}  // namespace
}  // namespace ssm
