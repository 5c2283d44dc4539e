// Decoder on the CPU.
#include "ssm/generate/decoder.h"

#include <gtest/gtest.h>

#include "tests/support/decoder_checks.h"
#include "tests/support/decoder_shapes.h"
#include "tests/support/expect_error.h"

namespace ssm::test {
namespace {

TEST(Decoder, AnyGroupsOfSlots) {
    for (const ReferenceShape& shape : decoder_shapes())
        for (const int64_t slots : {1, 3, 8, 20})
            expect_decodes(make_cpu_exec(1), shape, slots, DType::f32, 1e-5);
}

TEST(Decoder, Bf16) {
    for (const ReferenceShape& shape : decoder_shapes())
        expect_decodes(make_cpu_exec(1), shape, 5, DType::bf16, 3e-2);
}

TEST(Decoder, GreedySteps) {
    for (const ReferenceShape& shape : decoder_shapes()) expect_greedy_steps(make_cpu_exec(1), shape, 3);
}

TEST(Decoder, StatesMove) {
    for (const ReferenceShape& shape : decoder_shapes()) expect_states_move(make_cpu_exec(1), shape);
}

TEST(Decoder, Errors) {
    const ModelCase c(decoder_shapes().front());
    const Exec ex = make_cpu_exec(1);
    Decoder decoder(ex, *c.model, 2);
    const std::vector<int32_t> one{0}, two{0, 1}, same{1, 1}, outside{2}, three{0, 1, 0}, bad{-1};
    expect_error("[decode] a decoder needs at least one slot", [&] { Decoder(ex, *c.model, 0); });
    expect_error(
        "[decode] bf16 states need a GPU", [&] { Decoder(ex, *c.model, 1, DType::bf16); },
        ErrorCode::unsupported);
    expect_error("[decode] nothing was read yet", [&] { decoder.step(); });
    expect_error("[decode] slot 1 is twice in a step", [&] { decoder.step(same, two); });
    expect_error("[decode] there is no slot 2: there are 2", [&] { decoder.step(outside, one); });
    expect_error("[decode] a step has 1 to 2 slots, not 3", [&] { decoder.step(three, three); });
    expect_error("[decode] 2 slots but 1 ids", [&] { decoder.step(two, one); });
    expect_error("[model] token id -1 is outside the vocabulary of 11", [&] { decoder.step(one, bad); });
    expect_error("[decode] there is no slot 2: there are 2", [&] { decoder.clear(2); });
}

}  // namespace
}  // namespace ssm::test
