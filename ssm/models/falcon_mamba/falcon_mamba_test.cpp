// Falcon Mamba as a whole model: random ones of many shapes against the f64 reference.
#include "ssm/models/falcon_mamba/falcon_mamba.h"

#include <gtest/gtest.h>

#include "tests/support/model_checks.h"

namespace ssm::test {
namespace {

const NamedShape kShapes[] = {
    {"Plain", {.bcdt_eps = 1e-6}},
    {"LargeEpsilon", {.e = 12, .d = 24, .n = 16, .projection_bias = true, .r = 3, .bcdt_eps = 0.05}},
    {"UntiedState1Rank1", {.n = 1, .k = 2, .tied = false, .conv_bias = false, .r = 1, .bcdt_eps = 1e-6}},
    {"Expand3State20", {.e = 5, .d = 15, .n = 20, .k = 3, .r = 7, .bcdt_eps = 1e-6}},
};

class FalconMambaModel : public testing::TestWithParam<NamedShape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, FalconMambaModel, testing::ValuesIn(kShapes), shape_name);

TEST_P(FalconMambaModel, MatchesReference) { expect_matches_reference(GetParam().shape); }
TEST_P(FalconMambaModel, PiecesEqualWhole) { expect_pieces_equal_whole(GetParam().shape); }
TEST_P(FalconMambaModel, BatchEqualsOne) { expect_batch_equals_one(GetParam().shape); }
TEST_P(FalconMambaModel, GradientsMatchFiniteDifferences) { expect_gradients(GetParam().shape, {7, 1, 10}); }
TEST_P(FalconMambaModel, Bf16) { expect_bf16(GetParam().shape); }

TEST(FalconMambaWhole, ThreadsDoNotMatter) { expect_threads_do_not_matter(kShapes[1].shape); }

}  // namespace
}  // namespace ssm::test
