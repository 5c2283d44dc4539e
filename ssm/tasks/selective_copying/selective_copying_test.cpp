// The generator alone: what every sequence must be, its pieces, and that nothing gives the answer away.
#include "ssm/tasks/selective_copying/selective_copying.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ssm/tasks/test_sequences.h"

namespace ssm {
namespace {

using test::chi_square;
using test::sequence;
using test::Sequence;

const Task& kTask = find_task("selective-copying");

TEST(SelectiveCopying, AsksForTheDataInTheirOrder) {
    for (const int64_t length : {32, 33, 48, 256, 1000}) {
        for (uint64_t i = 0; i < 300; ++i) {
            const Sequence s = sequence(kTask, i, length);
            std::vector<int32_t> data;
            std::vector<int64_t> places;
            for (int64_t t = 0; t < length - 16; ++t) {
                EXPECT_EQ(s.targets[t], -1);
                if (s.ids[t] == 0) continue;
                data.push_back(s.ids[t]);
                places.push_back(t);
            }
            ASSERT_EQ(data.size(), 16u);
            EXPECT_TRUE(std::ranges::equal(places, selective_copying::data_positions(s.key, length)));
            EXPECT_TRUE(std::ranges::all_of(data, [](int32_t id) { return id >= 1 && id <= 14; }));
            for (int64_t j = 0; j < 16; ++j) {
                EXPECT_EQ(s.ids[length - 16 + j], 15);
                EXPECT_EQ(s.targets[length - 16 + j], data[j]);
            }
        }
    }
}

TEST(SelectiveCopying, PiecesAreTheWhole) {
    for (const int64_t length : {32, 45}) test::expect_pieces_are_the_whole(kTask, length);
}

TEST(SelectiveCopying, IsUniform) {
    constexpr int64_t kLength = 56, kSequences = 20000;  // 40 places for 16 tokens
    std::vector<int64_t> places(40), tokens(14), pairs(196), firsts(2);
    for (uint64_t i = 0; i < kSequences; ++i) {
        const Sequence s = sequence(kTask, i, kLength);
        for (int64_t t = 0; t < 40; ++t) {
            if (s.ids[t] == 0) continue;
            ++places[t];
            ++tokens[s.ids[t] - 1];
        }
        ++pairs[(s.targets[40] - 1) * 14 + s.targets[55] - 1];
        // Two places hold data together with the chance 16 15 / (40 39).
        ++firsts[s.ids[0] != 0 && s.ids[39] != 0];
    }
    EXPECT_LT(chi_square(places), 39 + 5 * 8.8);
    EXPECT_LT(chi_square(tokens), 13 + 5 * 5.1);
    EXPECT_LT(chi_square(pairs), 195 + 5 * 19.7);
    const double expected = kSequences * 16.0 * 15 / (40 * 39);
    EXPECT_NEAR(static_cast<double>(firsts[1]), expected, 5 * std::sqrt(expected));
}

}  // namespace
}  // namespace ssm
