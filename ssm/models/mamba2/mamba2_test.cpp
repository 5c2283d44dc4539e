// Mamba-2 as a whole model: random ones of many shapes against the f64 reference.
#include "ssm/models/mamba2/mamba2.h"

#include <gtest/gtest.h>

#include "tests/support/model_checks.h"

namespace ssm::test {
namespace {

constexpr auto kMamba2 = ReferenceShape::Kind::mamba2;
constexpr const char* kOriginal = "backbone.embedding.weight";  // mamba_ssm's layout

const NamedShape kShapes[] = {
    {"Plain", {.kind = kMamba2}},
    {"GroupsUntiedBias", mamba2_with_groups()},
    {"AGroupAHeadState1",
     {.kind = kMamba2, .e = 5, .d = 15, .n = 1, .k = 2, .conv_bias = false, .h = 3, .p = 5, .g = 3}},
    {"Expand1State20Width5",
     {.kind = kMamba2, .e = 12, .layers = 1, .d = 12, .n = 20, .k = 5, .h = 4, .p = 3}},
    {"TimeStepLimit", {.kind = kMamba2, .norm_eps = 1e-3, .dt_min = 0.4, .dt_max = 0.9}},
    {"OneHead", {.kind = kMamba2, .vocab = 37, .e = 17, .layers = 1, .d = 34, .n = 16, .h = 1, .p = 34}},
    {"MambaSsmGroupedNorm",
     {.kind = kMamba2,
      .e = 12,
      .d = 24,
      .n = 8,
      .h = 4,
      .p = 6,
      .g = 2,
      .norm_groups = 2,
      .embedding = kOriginal}},
    {"MambaSsmDPerChannel",
     {.kind = kMamba2, .projection_bias = true, .D_has_hdim = true, .embedding = kOriginal}},
    {"MambaSsmNormBeforeGate",
     {.kind = kMamba2,
      .n = 20,
      .tied = false,
      .h = 4,
      .p = 4,
      .g = 4,
      .norm_groups = 4,
      .norm_before_gate = true,
      .dt_max = 0.5,
      .embedding = kOriginal}},
};

class Mamba2Model : public testing::TestWithParam<NamedShape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, Mamba2Model, testing::ValuesIn(kShapes), shape_name);

TEST_P(Mamba2Model, MatchesReference) { expect_matches_reference(GetParam().shape); }
TEST_P(Mamba2Model, PiecesEqualWhole) { expect_pieces_equal_whole(GetParam().shape); }
TEST_P(Mamba2Model, BatchEqualsOne) { expect_batch_equals_one(GetParam().shape); }
TEST_P(Mamba2Model, GradientsMatchFiniteDifferences) { expect_gradients(GetParam().shape, {7, 1, 10}); }
TEST_P(Mamba2Model, Bf16) { expect_bf16(GetParam().shape); }

// More than one chunk of the SSD.
TEST(Mamba2Whole, GradientsAcrossChunks) {
    expect_gradients(kShapes[0].shape, {130, 3});
    expect_gradients(kShapes[6].shape, {130});
}

TEST(Mamba2Whole, ThreadsDoNotMatter) { expect_threads_do_not_matter(kShapes[1].shape); }

}  // namespace
}  // namespace ssm::test
