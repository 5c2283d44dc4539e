// Decoder on a GPU: steps by graph, in any groups, are the sequences read at once.
#include "ssm/generate/decoder.h"

#include <gtest/gtest.h>

#include "tests/support/cuda.h"
#include "tests/support/decoder_checks.h"
#include "tests/support/decoder_shapes.h"

namespace ssm::test {
namespace {

// A test for each shape: one process each under a sanitizer.
class DecoderCudaShapes : public ::testing::TestWithParam<size_t> {
protected:
    const ReferenceShape shape_ = decoder_shapes()[GetParam()];
};
INSTANTIATE_TEST_SUITE_P(All, DecoderCudaShapes, ::testing::Range(size_t{0}, decoder_shapes().size()));

TEST_P(DecoderCudaShapes, AnyGroupsOfSlots) {
    for (const int64_t slots : {1, 3, 8, 20}) expect_decodes(cuda_exec(), shape_, slots, DType::f32, 1e-4);
}

TEST_P(DecoderCudaShapes, Bf16) {
    for (const int64_t slots : {3, 20}) expect_decodes(cuda_exec(), shape_, slots, DType::bf16, 3e-2);
}

// More than one group of rows of norm_linear's kernel of tensor cores.
TEST(DecoderCuda, ManySlots) {
    expect_decodes(cuda_exec(), {}, 40, DType::f32, 1e-4);
    expect_decodes(cuda_exec(), {}, 40, DType::bf16, 3e-2);
}
TEST(DecoderCuda, ManySlotsInPacks) {
    const ReferenceShape packed{.vocab = 64, .e = 64, .d = 256, .n = 16, .r = 8};
    expect_decodes(cuda_exec(), packed, 40, DType::f32, 1e-4);
    expect_decodes(cuda_exec(), packed, 40, DType::bf16, 3e-2);
}

TEST(DecoderCuda, GreedySteps) {
    for (const ReferenceShape& shape : decoder_shapes())
        for (const int64_t slots : {1, 12}) expect_greedy_steps(cuda_exec(), shape, slots);
}

TEST(DecoderCuda, StatesMove) {
    for (const ReferenceShape& shape : decoder_shapes())
        for (const DType states : {DType::f32, DType::bf16}) expect_states_move(cuda_exec(), shape, states);
}

// 256 tokens read in bf16 states: what rounding the states at every step makes of the logits.
TEST_P(DecoderCudaShapes, Bf16States) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
        double worst = 0;
        for (const int32_t count : {1, 12}) {
            const ModelCase c(shape_, 3, dtype);
            c.model->move_to(cuda_exec());
            Decoder exact(cuda_exec(), *c.model, count), rounded(cuda_exec(), *c.model, count, DType::bf16);
            std::vector<int32_t> slots, ids(static_cast<size_t>(count));
            for (int32_t slot = 0; slot < count; ++slot) slots.push_back(slot);
            EXPECT_LT(rounded.state_bytes_per_slot(), exact.state_bytes_per_slot());
            Random random(5);
            for (int step = 1; step <= 256; ++step) {
                for (int32_t& id : ids) id = static_cast<int32_t>(random.integer(0, shape_.vocab - 1));
                exact.step(slots, ids);
                rounded.step(slots, ids);
                if (step % 32 != 0) continue;
                for (int32_t row = 0; row < count; ++row)
                    worst = std::max(
                        worst, relative_l2(host_row(rounded.logits(), row), host_row(exact.logits(), row)));
            }
        }
        EXPECT_LE(worst, 2e-2) << name_of(dtype);
        EXPECT_GT(worst, 1e-6) << "the states were not rounded";
    }
}

// What the graph of the second step does is what the first step did without one.
TEST(DecoderCuda, GraphsDoWhatWasCaptured) {
    for (const DType dtype : {DType::f32, DType::bf16})
        for (const ReferenceShape& shape : decoder_shapes()) {
            const ModelCase c(shape, 2, dtype);
            c.model->move_to(cuda_exec());
            const std::vector<int32_t> slots{0, 1, 2}, ids{1, 2, 3};
            Decoder decoder(cuda_exec(), *c.model, 3);
            std::vector<std::vector<float>> without;
            for (int i = 0; i < 2; ++i) {
                decoder.step(slots, ids);  // i = 0: as it is
                for (int32_t row = 0; row < 3; ++row) {
                    const auto logits = host_row(decoder.logits(), row);
                    if (i == 0) without.push_back(logits);
                    EXPECT_EQ(logits, without[static_cast<size_t>(row)]);
                    decoder.clear(row);
                }
            }
        }
}

}  // namespace
}  // namespace ssm::test
