// The generator alone: what every sequence must be, its pieces, and that nothing gives the answer away.
#include "ssm/tasks/induction_heads/induction_heads.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ssm/tasks/test_sequences.h"

namespace ssm {
namespace {

using test::chi_square;
using test::sequence;
using test::Sequence;

const Task& kTask = find_task("induction-heads");

TEST(InductionHeads, AsksForWhatFollowedTheFirstPrefix) {
    for (const int64_t length : {3, 4, 5, 64, 257}) {
        for (uint64_t i = 0; i < 500; ++i) {
            const Sequence s = sequence(kTask, i, length);
            const int64_t last = length - 1;
            const auto first = std::find(s.ids.begin(), s.ids.end(), 15) - s.ids.begin();
            ASSERT_LE(first, length - 3);
            EXPECT_EQ(first, induction_heads::prefix_position(s.key, length));
            EXPECT_EQ(std::count(s.ids.begin(), s.ids.end(), 15), 2);
            EXPECT_EQ(s.ids[last], 15);
            EXPECT_EQ(s.targets[last], s.ids[first + 1]);
            EXPECT_EQ(std::count(s.targets.begin(), s.targets.end(), -1), last);
            EXPECT_TRUE(std::ranges::all_of(s.ids, [](int32_t id) { return id >= 0 && id < 16; }));
        }
    }
}

TEST(InductionHeads, PiecesAreTheWhole) {
    for (const int64_t length : {3, 17, 64}) test::expect_pieces_are_the_whole(kTask, length);
}

TEST(InductionHeads, IsUniform) {
    constexpr int64_t kLength = 34, kSequences = 64000;
    std::vector<int64_t> places(kLength - 2), answers(15), tokens(15);
    std::vector<int64_t> token_and_answer(225);
    for (uint64_t i = 0; i < kSequences; ++i) {
        const Sequence s = sequence(kTask, i, kLength);
        const int64_t first = induction_heads::prefix_position(s.key, kLength);
        ++places[first];
        ++answers[s.targets.back()];
        // A token that is not the answer says nothing of it.
        const int64_t other = first >= 8 ? 3 : 20;
        ++tokens[s.ids[other]];
        ++token_and_answer[s.ids[other] * 15 + s.targets.back()];
    }
    // Degrees of freedom d: mean d, deviation sqrt(2 d).
    EXPECT_LT(chi_square(places), 31 + 5 * 7.9);
    EXPECT_LT(chi_square(answers), 14 + 5 * 5.3);
    EXPECT_LT(chi_square(tokens), 14 + 5 * 5.3);
    EXPECT_LT(chi_square(token_and_answer), 224 + 5 * 21.2);
}

TEST(InductionHeads, PublishedSettings) {
    const TaskRecipe& r = kTask.recipe;
    EXPECT_EQ(kTask.vocab, 16);
    EXPECT_EQ(r.steps, 25 * 8192);
    EXPECT_EQ(r.eval_lengths.front(), 64);
    EXPECT_EQ(r.eval_lengths.back(), 1 << 20);
    EXPECT_EQ(r.eval_lengths.size(), 15u);
}

}  // namespace
}  // namespace ssm
