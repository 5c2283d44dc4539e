#include "ssm/ops/cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
#include "ssm/ops/cross_entropy/cross_entropy_reference.h"
#include "tests/support/compare.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using namespace test;

std::vector<double> reference(const std::vector<double>& h, const std::vector<double>& w,
                              const std::vector<int32_t>& targets, int64_t e) {
    std::vector<double> nll;
    const int64_t v = static_cast<int64_t>(w.size()) / e;
    const double* hidden = h.data();
    for (const int32_t target : targets) {
        nll.push_back(target < 0 ? 0.0 : TokenLoss(hidden, w.data(), v, e).nll(target));
        hidden += e;
    }
    return nll;
}

std::vector<int32_t> random_targets(Random& random, int64_t t, int64_t v) {
    std::vector<int32_t> targets;
    for (int64_t i = 0; i < t; ++i) targets.push_back(static_cast<int32_t>(random.integer(-1, v - 1)));
    return targets;
}

View<const int32_t, 1> view_of(const std::vector<int32_t>& v) {
    return {v.data(), {static_cast<int64_t>(v.size())}};
}
View<const float, 1> view_of(const std::vector<float>& v) {
    return {v.data(), {static_cast<int64_t>(v.size())}};
}
Tensor borrowed(const std::vector<float>& v, int64_t rows, int64_t columns) {
    return Tensor::wrap(const_cast<float*>(v.data()), {rows, columns}, DType::f32, nullptr);
}
View<float, 1> view_of(std::vector<float>& v) { return {v.data(), {static_cast<int64_t>(v.size())}}; }

TEST(LinearCrossEntropy, MatchesReference) {
    Random random(1);
    const Exec ex = make_cpu_exec(2);
    for (const DType type : {DType::f32, DType::bf16}) {
        for (const auto [t, e, v] : std::vector<std::array<int64_t, 3>>{
                 {1, 1, 1}, {1, 7, 5}, {9, 8, 31}, {17, 5, 32}, {5, 3, 33}, {30, 33, 300}, {250, 4, 40001}}) {
            const Tensor h = Tensor::from_floats({t, e}, random.vector(t * e, -2, 2)).to(type);
            const Tensor w = Tensor::from_floats({v, e}, random.vector(v * e, -2, 2)).to(type);
            const std::vector<int32_t> targets = random_targets(random, t, v);
            std::vector<float> nll = nan_vector(t);
            linear_cross_entropy(ex, h, PackedWeight(w), view_of(targets), view_of(nll));
            const Tensor h32 = h.to(DType::f32), w32 = w.to(DType::f32);
            const std::vector<float> hv(h32.data<float>(), h32.data<float>() + t * e);
            const std::vector<float> wv(w32.data<float>(), w32.data<float>() + v * e);
            EXPECT_LE(relative_l2(nll, reference(to_double(hv), to_double(wv), targets, e)), 1e-6)
                << name_of(type) << " t " << t << " e " << e << " v " << v;
        }
    }
}

TEST(LinearCrossEntropy, TilesAreBoundedAndCoverTheTokens) {
    using cross_entropy_detail::tile_rows;
    for (const int64_t t : {1, 2, 165, 166, 167, 512, 100000}) {
        for (const int64_t v : {1, 256, 50280, 5000000}) {
            const int64_t rows = tile_rows(t, v);
            EXPECT_GE(rows, 1);
            EXPECT_LE(rows, t);
            EXPECT_LE((rows - 1) * v * 4, int64_t{32} << 20) << t << " " << v;
        }
    }
}

TEST(LinearCrossEntropy, LargeLogitsDoNotOverflow) {
    const Exec ex = make_cpu_exec(1);
    const Tensor h = Tensor::from_floats({2, 1}, {1.0f, -1.0f});
    const std::vector<float> weights{1000.0f, 900.0f, -1000.0f, 999.0f};
    const std::vector<int32_t> targets{3, 3};
    std::vector<float> nll = nan_vector(2);
    linear_cross_entropy(ex, h, PackedWeight(Tensor::from_floats({4, 1}, weights)), view_of(targets),
                         view_of(nll));
    EXPECT_NEAR(nll[0], 1.0 + std::log1p(std::exp(-1.0)), 1e-6);
    EXPECT_NEAR(nll[1], 1999.0, 1e-3);
}

// NaN anywhere in a row, vector part or tail, first or last, makes that row NaN and no other.
TEST(LinearCrossEntropy, NanShows) {
    const Exec ex = make_cpu_exec(2);
    for (const int64_t v : {5, 32, 71}) {
        for (int64_t place = 0; place < v; ++place) {
            std::vector<float> weights(static_cast<size_t>(v), 0.25f);
            weights[static_cast<size_t>(place)] = 1e30f;
            const Tensor w = Tensor::from_floats({v, 1}, weights);
            for (const float bad : {NAN, 1e30f}) {  // NaN hits all logits; 1e60 overflows at `place` alone
                const Tensor h = Tensor::from_floats({3, 1}, {1e-30f, bad, -1e-30f});
                const std::vector<int32_t> targets{0, 1, 2};
                const std::vector<float> grad_nll(3, 1.0f);
                std::vector<float> nll = nan_vector(3);
                linear_cross_entropy(ex, h, PackedWeight(w), view_of(targets), view_of(nll));
                EXPECT_TRUE(std::isfinite(nll[0]) && std::isnan(nll[1]) && std::isfinite(nll[2]))
                    << v << " " << place;
                nll.assign(3, 0.0f);
                const Tensor grad_h = Tensor::zeros({3, 1});
                linear_cross_entropy_backward(ex, h, w, view_of(targets), view_of(grad_nll), view_of(nll),
                                              grad_h, {});
                EXPECT_TRUE(std::isfinite(nll[0]) && std::isnan(nll[1]) && std::isfinite(nll[2]))
                    << v << " " << place;
                EXPECT_TRUE(std::isnan(grad_h.data<float>()[1]));
                EXPECT_TRUE(std::isfinite(grad_h.data<float>()[2]));
            }
        }
    }
}

TEST(LinearCrossEntropy, OneNanLogitIsNotSwallowed) {
    const Exec ex = make_cpu_exec(1);
    for (const int64_t v : {3, 32, 50}) {
        for (int64_t place = 0; place < v; ++place) {
            std::vector<float> logits(static_cast<size_t>(v), 0.5f);
            logits[static_cast<size_t>(place)] = NAN;
            const int32_t target = place == 0 ? 1 : 0;
            float nll = 0;
            cross_entropy_detail::nll_of_rows(ex, {1, v, logits.data(), &target, &nll, nullptr});
            EXPECT_TRUE(std::isnan(nll)) << v << " " << place;
        }
    }
}

class CrossEntropyBackward : public testing::TestWithParam<MatmulPrecision> {};
INSTANTIATE_TEST_SUITE_P(All, CrossEntropyBackward,
                         testing::Values(MatmulPrecision::f32, MatmulPrecision::bf16));

TEST_P(CrossEntropyBackward, GradientsMatchFiniteDifferences) {
    Random random(2);
    Exec ex = make_cpu_exec(2);
    ex.matmul = GetParam();
    for (const auto [t, e, v] : std::vector<std::array<int64_t, 3>>{{1, 2, 3}, {6, 5, 19}, {11, 3, 70}}) {
        const std::vector<float> h = random.vector(t * e), w = random.vector(v * e),
                                 g = random.vector(t, 0.1f, 2);
        const std::vector<int32_t> targets = random_targets(random, t, v);
        std::vector<float> nll = nan_vector(t);
        std::vector<float> grad_h(h.size(), kGradientStart), grad_w(w.size(), kGradientStart);
        const Tensor ht = borrowed(h, t, e), wt = borrowed(w, v, e);
        linear_cross_entropy_backward(ex, ht, wt, view_of(targets), view_of(g), view_of(nll),
                                      borrowed(grad_h, t, e), View<float, 2>(grad_w.data(), {v, e}));
        auto hd = to_double(h), wd = to_double(w);
        const auto loss = [&, e = e] {
            const auto rows = reference(hd, wd, targets, e);
            double sum = 0;
            for (size_t i = 0; i < rows.size(); ++i) sum += rows[i] * static_cast<double>(g[i]);
            return sum;
        };
        const double tolerance = GetParam() == MatmulPrecision::bf16 ? 1e-2 : 2e-6;
        expect_close(nll, reference(hd, wd, targets, e), tolerance, "nll");
        expect_close(added(grad_h), finite_differences(hd, loss), tolerance, "grad_hidden");
        expect_close(added(grad_w), finite_differences(wd, loss), tolerance, "grad_weight");
        std::vector<float> set_h = nan_vector(t * e), set_w = nan_vector(v * e);
        linear_cross_entropy_backward(ex, ht, wt, view_of(targets), view_of(g), view_of(nll),
                                      borrowed(set_h, t, e), {set_w.data(), {v, e}}, {true, true});
        expect_close(set_h, finite_differences(hd, loss), tolerance, "grad_hidden, set");
        expect_close(set_w, finite_differences(wd, loss), tolerance, "grad_weight, set");
    }
}

TEST(MeanNll, DividesTheSumInF64) {
    const Exec ex = make_cpu_exec(2);
    const std::vector<float> nll{1e8f, 1.0f, 0.0f, 2.5f};
    float mean = NAN;
    mean_nll(ex, view_of(nll), 3.0, {&mean, {1}});
    EXPECT_EQ(mean, static_cast<float>((1e8 + 3.5) / 3.0));
    mean_nll(ex, {nll.data(), {0}}, 1.0, {&mean, {1}});
    EXPECT_EQ(mean, 0.0f);
}

// Several tiles against groups of 30 tokens, with rows that have a stride.
TEST(CrossEntropyTiles, AddUp) {
    Random random(3);
    const Exec ex = make_cpu_exec(2);
    const int64_t t = 300, e = 3, v = 40000, stride = 5;
    ASSERT_LT(cross_entropy_detail::tile_rows(t, v), t);
    const std::vector<float> h = random.vector(t * stride), w = random.vector(v * e), g = random.vector(t);
    const std::vector<int32_t> targets = random_targets(random, t, v);
    std::vector<float> nll = nan_vector(t), nll_one = nan_vector(t);
    std::vector<float> grad_h(static_cast<size_t>(t * stride)), grad_w(w.size()), grad_h_one = grad_h,
                                                                                  grad_w_one = grad_w;
    const Tensor ht = borrowed(h, t, stride).columns(0, e), wt = borrowed(w, v, e);
    const Tensor gt = borrowed(grad_h, t, stride).columns(0, e),
                 gt_one = borrowed(grad_h_one, t, stride).columns(0, e);
    linear_cross_entropy_backward(ex, ht, wt, view_of(targets), view_of(g), view_of(nll), gt,
                                  View<float, 2>(grad_w.data(), {v, e}));
    for (int64_t i = 0; i < t; i += 30) {
        linear_cross_entropy_backward(ex, ht.rows(i, i + 30), wt, {targets.data() + i, {30}},
                                      {g.data() + i, {30}}, {nll_one.data() + i, {30}},
                                      gt_one.rows(i, i + 30), View<float, 2>(grad_w_one.data(), {v, e}));
    }
    expect_close(nll, nll_one, 1e-6, "nll");
    expect_close(grad_h, grad_h_one, 1e-5, "grad_hidden");
    expect_close(grad_w, grad_w_one, 1e-5, "grad_weight");
    std::vector<float> set_w = nan_vector(v * e);
    linear_cross_entropy_backward(ex, ht, wt, view_of(targets), view_of(g), view_of(nll), {},
                                  View<float, 2>(set_w.data(), {v, e}), {.weight = true});
    expect_close(set_w, grad_w, 1e-6, "grad_weight, set");
    std::vector<float> again = nan_vector(t);
    linear_cross_entropy_backward(make_cpu_exec(1), ht, wt, view_of(targets), view_of(g), view_of(again), {},
                                  {});
    EXPECT_EQ(again, nll);  // on one thread, without gradients
}

TEST(LinearCrossEntropyErrors, NameTargetAndShape) {
    const Exec ex = make_cpu_exec(1);
    const Tensor h = Tensor::zeros({3, 2});
    const PackedWeight w(Tensor::zeros({4, 2}));
    std::vector<float> nll(3);
    const auto message = [&](auto&& f) -> std::string {
        try {
            f();
        } catch (const Error& error) {
            return error.what();
        }
        return "no error";
    };
    const std::vector<int32_t> high{0, 4, 1}, fine{0, 3, -5}, two{0, 1};
    EXPECT_EQ(message([&] { linear_cross_entropy(ex, h, w, view_of(high), view_of(nll)); }),
              "[linear_cross_entropy] target 4 at position 1 is not below the vocabulary's 4 entries");
    EXPECT_EQ(message([&] { linear_cross_entropy(ex, h, w, view_of(fine), view_of(nll)); }), "no error");
    EXPECT_EQ(message([&] { linear_cross_entropy(ex, h, w, view_of(two), view_of(nll)); }),
              "[linear_cross_entropy] `targets` must be [t] = [3] but is [2]");
    EXPECT_EQ(message([&] {
                  linear_cross_entropy(ex, Tensor::zeros({3, 5}), w, view_of(fine), view_of(nll));
              }),
              "[linear_cross_entropy] `hidden` must be [t 2] but is [3, 5]");
    const std::vector<float> g(3);
    EXPECT_EQ(
        message([&] {
            linear_cross_entropy_backward(ex, h, w.weight(), view_of(high), view_of(g), view_of(nll), {}, {});
        }),
        "[linear_cross_entropy_backward] target 4 at position 1 is not below the vocabulary's 4 entries");
    EXPECT_EQ(message([&] {
                  linear_cross_entropy_backward(ex, h, w.weight(), view_of(fine), view_of(g), view_of(nll),
                                                {}, h.view<float, 2>());
              }),
              "[linear_cross_entropy_backward] `grad_weight` must be [v e] = [4, 2] but is [3, 2]");
}

}  // namespace
}  // namespace ssm
