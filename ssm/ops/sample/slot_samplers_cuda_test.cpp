// SlotSamplers on a GPU: every choice is the CPU's Sampler's, or rounding could have decided it.
#include "ssm/ops/sample/slot_samplers.h"

#include <gtest/gtest.h>

#include "tests/support/cuda.h"
#include "tests/support/slot_sampler_checks.h"

namespace ssm::test {
namespace {

TEST(SlotSamplersCuda, ChooseLikeSamplers) {
    for (const int64_t v : {1, 5, 31, 1000, 4097, 50280})
        expect_like_samplers(cuda_exec(), v, v > 5000 ? 12 : 40);
}

TEST(SlotSamplersCuda, EqualLogits) {
    const Exec& ex = cuda_exec();
    for (const int64_t v : {3, 2000}) {
        const Tensor logits = on_device(std::vector<float>(static_cast<size_t>(v), -1.5f), {1, v}),
                     ids = on_device(std::vector<int32_t>{0}, {1});
        for (const SamplerOptions& o :
             {SamplerOptions{.top_k = 2}, SamplerOptions{.top_p = 0.5f},
              SamplerOptions{.top_k = 3, .top_p = 0.6f}, SamplerOptions{.min_p = 0.9f}}) {
            SlotSamplers there(ex, 1, v);
            there.set(ex, 0, o, 0, {});
            Sampler here(o);
            const std::vector<float> row(static_cast<size_t>(v), -1.5f);
            for (int i = 0; i < 20; ++i) {
                there.sample(ex, logits.view<const float, 2>(), {}, ids.view<int32_t, 1>(), false);
                EXPECT_EQ(from_device<int32_t>(ids)[0], here.sample(row, v, {})) << v;
            }
            EXPECT_EQ(there.draws(0), 20u);
        }
    }
}

TEST(SlotSamplersCuda, NoChoice) {
    const Exec& ex = cuda_exec();
    const Tensor logits = on_device(
                     std::vector<float>{1, NAN, 3, -INFINITY, -INFINITY, -INFINITY, 1, INFINITY, 0, 1, 2, 3},
                     {4, 3}),
                 ids = on_device(std::vector<int32_t>{7, 7, 7, 7}, {4});
    for (const float temperature : {0.0f, 1.0f}) {
        SlotSamplers samplers(ex, 4, 3);
        for (int64_t slot = 0; slot < 4; ++slot)
            samplers.set(ex, slot, {.temperature = temperature, .top_k = 1}, 0, {});
        samplers.sample(ex, logits.view<const float, 2>(), {}, ids.view<int32_t, 1>(), false);
        EXPECT_EQ(from_device<int32_t>(ids), (std::vector<int32_t>{-1, -1, -1, 2}));
        EXPECT_EQ(samplers.draws(0), 0u);
        EXPECT_EQ(samplers.draws(3), temperature == 0 ? 0u : 1u);
    }
}

}  // namespace
}  // namespace ssm::test
