// The CUDA kernels against a plain loop; out-of-range ids; runs of equal ids of every length.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/embedding/embedding.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

std::vector<int32_t> draw(int64_t t, int64_t v) {
    test::Random random(3);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < t; ++i) ids.push_back(static_cast<int32_t>(random.integer(0, v - 1)));
    return ids;
}

// `apart`: columns that rows lie apart; the kernel must not write between them.
template <class W, class Y>
void check_forward(int64_t t, int64_t v, int64_t e, int64_t apart) {
    SCOPED_TRACE(testing::Message() << "t " << t << " e " << e << " apart " << apart);
    const Exec& ex = test::cuda_exec();
    std::vector<int32_t> ids = draw(t, v);
    if (t > 2) ids[1] = static_cast<int32_t>(v), ids[2] = -1;
    test::Random random(5);
    const auto weight = random.vector<W>(v * (e + apart));
    const Tensor ids_there = test::on_device(ids, {t}),
                 weight_there = test::on_device(weight, {v, e + apart}),
                 y = test::on_device(test::nan_vector<Y>(t * (e + apart)), {t, e + apart});
    embedding<W, Y>(ex, ids_there.view<const int32_t, 1>(), weight_there.columns(0, e).view<const W, 2>(),
                    y.columns(0, e).view<Y, 2>());
    const auto got = test::from_device<Y>(y);
    for (int64_t i = 0; i < t; ++i) {
        for (int64_t j = 0; j < e + apart; ++j) {
            const auto value = static_cast<float>(got[static_cast<size_t>(i * (e + apart) + j)]);
            const int32_t id = ids[static_cast<size_t>(i)];
            if (j >= e || id < 0 || id >= v) {
                ASSERT_TRUE(std::isnan(value)) << i << " " << j;
            } else {
                const auto w = weight[static_cast<size_t>(id * (e + apart) + j)];
                ASSERT_EQ(value, static_cast<float>(static_cast<Y>(static_cast<float>(w)))) << i << " " << j;
            }
        }
    }
}

TEST(EmbeddingCuda, MatchesReference) {
    for (const int64_t t : {0, 1, 3, 1000}) {
        for (const int64_t e : {1, 16, 53, 128, 768}) {
            for (const int64_t apart : {0, 1, 8}) {
                check_forward<float, float>(t, 11, e, apart);
                check_forward<float, bf16>(t, 11, e, apart);
                check_forward<bf16, float>(t, 11, e, apart);
                check_forward<bf16, bf16>(t, 11, e, apart);
            }
        }
    }
}

// `often`: of ten ids so many are the same one, whose run in sorted order is cut into many segments.
void check_gradient(int64_t t, int64_t e, int often) {
    SCOPED_TRACE(testing::Message() << "t " << t << " e " << e << " often " << often);
    const Exec& ex = test::cuda_exec();
    const int64_t v = 7;
    std::vector<int32_t> ids = draw(t, v);
    test::Random random(5);
    for (int32_t& id : ids) {
        if (random.integer(0, 9) < often) id = 4;
    }
    if (t > 2) ids[1] = static_cast<int32_t>(v), ids[2] = -1;
    const auto grad_y = random.vector(t * e);
    std::vector<double> expected(static_cast<size_t>(v * e), static_cast<double>(test::kGradientStart));
    for (int64_t i = 0; i < t; ++i) {
        const int32_t id = ids[static_cast<size_t>(i)];
        if (id < 0 || id >= v) continue;
        for (int64_t j = 0; j < e; ++j)
            expected[static_cast<size_t>(id * e + j)] +=
                static_cast<double>(grad_y[static_cast<size_t>(i * e + j)]);
    }
    const Tensor ids_there = test::on_device(ids, {t}), grad_y_there = test::on_device(grad_y, {t, e});
    const auto run = [&] {
        const Tensor grad =
            test::on_device(std::vector<float>(static_cast<size_t>(v * e), test::kGradientStart), {v, e});
        embedding_backward(ex, ids_there.view<const int32_t, 1>(), grad_y_there.view<const float, 2>(),
                           grad.view<float, 2>());
        return test::from_device<float>(grad);
    };
    const auto first = run();
    test::expect_close(first, expected, 2e-6, "grad_weight");
    EXPECT_EQ(run(), first) << "not the same bytes";
}

TEST(EmbeddingCuda, GradientsMatchReference) {
    for (const int64_t t : {0, 1, 40, 127, 128, 129, 256, 257, 2000, 20000}) {
        for (const int64_t e : {1, 64, 300}) {
            for (const int often : {0, 9, 10}) check_gradient(t, e, often);
        }
    }
}

}  // namespace
}  // namespace ssm
