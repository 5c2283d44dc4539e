// SlotSamplers on the CPU: each slot is a Sampler of its own.
#include "ssm/ops/sample/slot_samplers.h"

#include <gtest/gtest.h>

#include "tests/support/slot_sampler_checks.h"

namespace ssm::test {
namespace {

TEST(SlotSamplers, ChooseLikeSamplers) {
    for (const int64_t v : {1, 5, 100, 3000}) expect_like_samplers(make_cpu_exec(1), v, 30);
}

TEST(SlotSamplers, Errors) {
    const Exec ex = make_cpu_exec(1);
    SlotSamplers samplers(ex, 2, 5);
    expect_error("[sample] there is no slot 2: there are 2", [&] { samplers.set(ex, 2, {}, 0, {}); });
    expect_error("[sample] top_p must be in (0, 1] but is 0",
                 [&] { samplers.set(ex, 0, {.top_p = 0}, 0, {}); });
    const std::vector<int32_t> outside{5};
    expect_error("[sample] the history holds id 5, outside [0, 5)", [&] { samplers.saw(ex, 0, outside); });
}

}  // namespace
}  // namespace ssm::test
