#include "ssm/ops/embedding/embedding.h"

#include <gtest/gtest.h>

#include <cmath>
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

std::vector<int32_t> random_ids(int64_t t, int64_t v, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> ids(static_cast<size_t>(t) + 1);  // one more: its data() is never null
    for (int32_t& id : ids) id = static_cast<int32_t>(random.integer(0, v - 1));
    return ids;
}

template <class W, class Y>
void check_forward(int64_t t, int64_t v, int64_t e, int threads) {
    SCOPED_TRACE(testing::Message() << "t " << t << " v " << v << " e " << e << " threads " << threads);
    const std::vector<int32_t> ids = random_ids(t, v, 3);
    Random random(5);
    Strided<W> weight(v, e, NAN);
    weight.assign(random.vector(v * e));
    Strided<Y> y(t, e, 9.0f);
    y.assign(std::vector<float>(static_cast<size_t>(t * e), NAN));
    embedding<W, Y>(make_cpu_exec(threads), {ids.data(), {t}}, weight.view(), y.view());
    for (int64_t i = 0; i < t; ++i) {
        for (int64_t j = 0; j < e; ++j) {
            const W source = weight.row(ids[static_cast<size_t>(i)])[j];
            const float expected = static_cast<float>(static_cast<Y>(static_cast<float>(source)));
            ASSERT_EQ(static_cast<float>(y.row(i)[j]), expected) << "token " << i << " column " << j;
        }
    }
    EXPECT_TRUE(y.gaps_untouched(9.0f));
}

TEST(Embedding, MatchesReference) {
    test::for_each_target([] {
        for (const int threads : {1, 2}) {
            for (const int64_t t : {0, 1, 3, 1000}) {
                for (const int64_t e : {1, 16, 53, 128}) {
                    check_forward<float, float>(t, 11, e, threads);
                    check_forward<float, bf16>(t, 11, e, threads);
                    check_forward<bf16, float>(t, 11, e, threads);
                    check_forward<bf16, bf16>(t, 11, e, threads);
                }
            }
        }
    });
}

TEST(Embedding, StridedIds) {
    const std::vector<int32_t> ids = {2, -7, 0, -7, 1, -7};
    const std::vector<float> weight = {10, 11, 12};
    std::vector<float> y = test::nan_vector(3);
    embedding<float, float>(make_cpu_exec(1), View<const int32_t, 1>(ids.data(), {3}, 2),
                            {weight.data(), {3, 1}}, {y.data(), {3, 1}});
    EXPECT_EQ(y, (std::vector<float>{12, 10, 11}));
}

// The order of t is part of the contract, so the f32 sum is reproduced to the bit.
void check_backward(int64_t t, int64_t v, int64_t e) {
    SCOPED_TRACE(testing::Message() << "t " << t << " v " << v << " e " << e);
    const std::vector<int32_t> ids = random_ids(t, v, 3);
    Random random(5);
    Strided<float> grad_y(t, e, NAN);
    grad_y.assign(random.vector(t * e));
    std::vector<float> expected(static_cast<size_t>(v * e), test::kGradientStart);
    std::vector<double> exact(expected.size(), 0.0);
    for (int64_t i = 0; i < t; ++i) {
        for (int64_t j = 0; j < e; ++j) {
            const auto at = static_cast<size_t>(ids[static_cast<size_t>(i)] * e + j);
            expected[at] += grad_y.row(i)[j];
            exact[at] += static_cast<double>(grad_y.row(i)[j]);
        }
    }
    for (const int threads : {1, 2, 3, 7}) {
        Strided<float> grad(v, e, 9.0f);
        grad.assign(std::vector<float>(static_cast<size_t>(v * e), test::kGradientStart));
        embedding_backward(make_cpu_exec(threads), {ids.data(), {t}}, grad_y.view(), grad.view());
        EXPECT_EQ(grad.values(), expected) << threads << " threads";
        test::expect_close(test::added(grad.values()), exact, 1e-5, "grad_weight");
        EXPECT_TRUE(grad.gaps_untouched(9.0f));
    }
}

TEST(Embedding, GradientAddsInTheOrderOfTokensOnAnyThreads) {
    test::for_each_target([] {
        for (const int64_t t : {0, 1, 40, 2000}) {
            for (const int64_t e : {1, 63, 64, 65, 300}) check_backward(t, 7, e);
        }
    });
}

TEST(Embedding, Errors) {
    const Exec ex = make_cpu_exec(1);
    std::vector<float> weight(12), y(6);
    const View<const float, 2> w{weight.data(), {4, 3}};
    const auto run = [&](std::vector<int32_t> ids) {
        embedding<float, float>(ex, {ids.data(), {std::ssize(ids)}}, w, {y.data(), {2, 3}});
    };
    expect_error("[embedding] ids[1] = 4 is outside the vocabulary [0, 4)", [&] { run({0, 4}); });
    expect_error("[embedding] ids[0] = -1 is outside the vocabulary [0, 4)", [&] { run({-1, 0}); });
    expect_error("[embedding] `y` must be [t e] = [3, 3] but is [2, 3]", [&] { run({0, 0, 0}); });
    expect_error("[embedding_backward] ids[1] = 9 is outside the vocabulary [0, 4)", [&] {
        const std::vector<int32_t> ids = {0, 9};
        embedding_backward(ex, {ids.data(), {2}}, {y.data(), {2, 3}}, {weight.data(), {4, 3}});
    });
    expect_error("[embedding_backward] `grad_y` must be [t e] = [1, 3] but is [2, 3]", [&] {
        const std::vector<int32_t> ids = {0};
        embedding_backward(ex, {ids.data(), {1}}, {y.data(), {2, 3}}, {weight.data(), {4, 3}});
    });
}

}  // namespace
}  // namespace ssm
