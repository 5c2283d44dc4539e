// Mamba as a whole model: random ones of many shapes against the f64 reference.
#include "ssm/models/mamba/mamba.h"

#include <gtest/gtest.h>

#include "tests/support/model_checks.h"

namespace ssm::test {
namespace {

const NamedShape kShapes[] = {
    {"Plain", {}},
    {"ProjectionBias", {.e = 12, .d = 24, .n = 16, .projection_bias = true, .r = 3}},
    {"UntiedNoConvBiasState1", {.n = 1, .k = 2, .tied = false, .conv_bias = false, .r = 5}},
    {"Expand3State20Width5", {.e = 5, .d = 15, .n = 20, .k = 5, .r = 1}},
    {"Expand1State8Width3", {.e = 16, .layers = 1, .d = 16, .n = 8, .k = 3, .tied = false, .r = 7}},
    {"Wide", {.vocab = 50, .e = 33, .layers = 1, .d = 66, .n = 16, .norm_eps = 1e-3}},
    {"MambaSsmLayout",
     {.layers = 3, .n = 8, .projection_bias = true, .r = 3, .embedding = "backbone.embedding.weight"}},
};

class MambaModel : public testing::TestWithParam<NamedShape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, MambaModel, testing::ValuesIn(kShapes), shape_name);

TEST_P(MambaModel, MatchesReference) { expect_matches_reference(GetParam().shape); }
TEST_P(MambaModel, PiecesEqualWhole) { expect_pieces_equal_whole(GetParam().shape); }
TEST_P(MambaModel, BatchEqualsOne) { expect_batch_equals_one(GetParam().shape); }
TEST_P(MambaModel, GradientsMatchFiniteDifferences) { expect_gradients(GetParam().shape, {7, 1, 10}); }
TEST_P(MambaModel, Bf16) { expect_bf16(GetParam().shape); }

TEST(MambaWhole, ThreadsDoNotMatter) { expect_threads_do_not_matter(kShapes[1].shape); }

// More than one chunk of the scan.
TEST(MambaWhole, GradientsAcrossChunks) {
    expect_gradients(kShapes[0].shape, {66, 3});
    expect_gradients(kShapes[3].shape, {130});
}

}  // namespace
}  // namespace ssm::test
