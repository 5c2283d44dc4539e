// What is recomputed changes memory, not one byte of a gradient.
#include <gtest/gtest.h>

#include "ssm/train/recompute_test.h"

namespace ssm::test {
namespace {

TEST(Recompute, GivesTheSameBytesInLessMemory) {
    for (const char* architecture : {"mamba", "mamba2", "falcon_mamba"}) {
        const auto run = [&](Recompute recompute) {
            return gradients_of(make_cpu_exec(1), architecture, {.recompute = recompute});
        };
        const BatchGradients kept = run(Recompute::none), cheap = run(Recompute::cheap),
                             layers = run(Recompute::layers);
        EXPECT_EQ(cheap.bytes, kept.bytes) << architecture;
        EXPECT_EQ(layers.bytes, kept.bytes) << architecture;
        EXPECT_LT(cheap.peak, kept.peak) << architecture;
        EXPECT_GT(kept.bytes.size(), 10u);
    }
}

}  // namespace
}  // namespace ssm::test
