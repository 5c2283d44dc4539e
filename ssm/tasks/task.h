// A synthetic task: sequences made by rule, where some positions ask for an answer that the sequence holds.
//
// Randomness is counter-based: sequence i of a run is a function of (seed, i), and each of its tokens of
// (that, position). Nothing is stored, a run resumes exactly, and a sequence of any length can be made in
// pieces. A task is a folder beside this file and a line in task.cpp.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "ssm/train/hash.h"

namespace ssm {

// How a task is trained and tested where the command line does not say; Adam without weight decay.
struct TaskRecipe {
    int64_t layers = 2, e = 64;
    int64_t length = 256, batch = 8, steps = 0;
    int64_t first_length = 0, double_every = 0;  // TaskSourceOptions
    double learning_rate = 1e-3;
    double last_learning_rate = 0;  // by a cosine; 0: constant
    double eps = 1e-8;              // of Adam
    double dt_min = 0, dt_max = 0;  // first step sizes; 0: the architecture's
    std::vector<int64_t> eval_lengths;
};

// Part of a sequence: positions begin .. begin + ids.size(). `targets` is -1 where nothing is asked.
struct TaskPiece {
    int64_t length = 0, begin = 0;  // of the whole sequence; of the part in it
    std::span<int32_t> ids, targets;
};

struct Task {
    std::string_view name, summary;
    int64_t vocab = 0;
    int64_t shortest = 0;                             // sequence that has room for the task
    double chance = 0;                                // accuracy of a guess
    void (*write)(uint64_t key, const TaskPiece& p);  // of the sequence that `key` chooses
    TaskRecipe recipe;
};

std::span<const Task> tasks();
const Task& find_task(std::string_view name);  // throws, naming the known ones

// The key of sequence `index`. Training and evaluation see different ones under the same seed.
enum class TaskSplit : uint64_t { train = 0, valid = 1, eval = 2 };
constexpr uint64_t sequence_key(uint64_t seed, TaskSplit split, uint64_t index) {
    return mix64(mix64(mix64(seed) + static_cast<uint64_t>(split)) ^ mix64(index));
}

// Uniform in [0, n), n < 2^32, by the upper bits: draw number `counter` of `key`. Off uniform by n / 2^32.
constexpr uint64_t draw(uint64_t key, uint64_t counter, uint64_t n) {
    return ((mix64(key + counter) >> 32) * n) >> 32;
}

}  // namespace ssm
