// The greedy choice on a GPU against the CPU's.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/sample/sample.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

TEST(ArgmaxCuda, MatchesTheCpu) {
    for (const int64_t v : {1, 3, 4, 1000, 1024, 4097, 50280}) {
        for (const int64_t apart : {0, 1, 4}) {
            const int64_t b = 5;
            test::Random random(static_cast<uint64_t>(v));
            auto logits = random.vector(b * (v + apart));
            for (float& x : logits) x = std::round(x * 50.0f);  // many ties, both zeros
            std::vector<int32_t> want;
            for (int64_t i = 0; i < b; ++i) {
                for (int64_t j = 0; j < apart; ++j)
                    logits[static_cast<size_t>(i * (v + apart) + v + j)] = INFINITY;
                if (i == 4)
                    for (int64_t j = 0; j < v; ++j)
                        logits[static_cast<size_t>(i * (v + apart) + j)] = -INFINITY;
                want.push_back(argmax({logits.data() + i * (v + apart), static_cast<size_t>(v)}));
            }
            const Tensor there = test::on_device(logits, {b, v + apart}),
                         ids = test::on_device(std::vector<int32_t>(b, -7), {b});
            argmax(test::cuda_exec(), there.columns(0, v).view<const float, 2>(), ids.view<int32_t, 1>());
            EXPECT_EQ(test::from_device<int32_t>(ids), want) << "v " << v << " apart " << apart;
        }
    }
}

TEST(ArgmaxCuda, NotANumber) {
    const Tensor there =
                     test::on_device(std::vector<float>{1, 2, 3, NAN, 5, INFINITY, -0.0f, 0.0f, -1}, {3, 3}),
                 ids = test::on_device(std::vector<int32_t>(3, -7), {3});
    argmax(test::cuda_exec(), there.view<const float, 2>(), ids.view<int32_t, 1>());
    EXPECT_EQ(test::from_device<int32_t>(ids), (std::vector<int32_t>{2, -1, 0}));
}

}  // namespace
}  // namespace ssm
