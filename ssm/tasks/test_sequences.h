// What the tests of generators share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "ssm/tasks/task.h"

namespace ssm::test {

struct Sequence {
    uint64_t key = 0;
    std::vector<int32_t> ids, targets;
};

// Positions begin .. begin + count; what is not written stays -7.
inline Sequence piece(const Task& task, uint64_t index, int64_t length, int64_t begin, int64_t count) {
    Sequence s{.key = sequence_key(5, TaskSplit::train, index), .ids = {}, .targets = {}};
    s.ids.assign(static_cast<size_t>(count), -7);
    s.targets = s.ids;
    task.write(s.key, {.length = length, .begin = begin, .ids = s.ids, .targets = s.targets});
    return s;
}

inline Sequence sequence(const Task& task, uint64_t index, int64_t length) {
    return piece(task, index, length, 0, length);
}

inline void expect_pieces_are_the_whole(const Task& task, int64_t length) {
    for (uint64_t index = 0; index < 20; ++index) {
        const Sequence whole = sequence(task, index, length);
        for (int64_t size = 1; size <= length; ++size) {
            for (int64_t begin = 0; begin < length; begin += size) {
                const int64_t count = std::min(size, length - begin);
                const Sequence part = piece(task, index, length, begin, count);
                for (int64_t i = 0; i < count; ++i) {
                    ASSERT_EQ(part.ids[i], whole.ids[begin + i]) << begin << " + " << i;
                    ASSERT_EQ(part.targets[i], whole.targets[begin + i]) << begin << " + " << i;
                }
            }
        }
    }
}

// Pearson's statistic against the uniform distribution.
inline double chi_square(const std::vector<int64_t>& counts) {
    const double total = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    const double expected = total / static_cast<double>(counts.size());
    double sum = 0;
    for (const int64_t n : counts) sum += std::pow(static_cast<double>(n) - expected, 2.0) / expected;
    return sum;
}

}  // namespace ssm::test
