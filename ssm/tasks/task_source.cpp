#include "ssm/tasks/task_source.h"

#include <algorithm>

#include <fmt/format.h>

#include "ssm/core/error.h"

namespace ssm {

void write_sequences(const Task& task, uint64_t seed, TaskSplit split, uint64_t first, int64_t count,
                     int64_t length, Batch& batch) {
    const auto size = static_cast<size_t>(length);
    batch.ids.resize(static_cast<size_t>(count) * size);
    batch.targets.resize(batch.ids.size());
    batch.cu_seqlens.assign(1, 0);
    const std::span<int32_t> ids(batch.ids), targets(batch.targets);
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
        task.write(sequence_key(seed, split, first + i), {.length = length,
                                                          .begin = 0,
                                                          .ids = ids.subspan(i * size, size),
                                                          .targets = targets.subspan(i * size, size)});
        batch.cu_seqlens.push_back(static_cast<int64_t>((i + 1) * size));
    }
}

TaskSource::TaskSource(const Task& task, TaskSourceOptions options) : task_(task), options_(options) {
    require(options.length >= task.shortest, "task", "'{}' needs a length of at least {} but it is {}",
            task.name, task.shortest, options.length);
    require_batch("task", options.batch, options.length);
    if (options.first_length == 0) return;
    require(options.first_length >= task.shortest && options.first_length <= options.length, "task",
            "'{}' needs a first length in [{}, {}] but it is {}", task.name, task.shortest, options.length,
            options.first_length);
    require(options.double_every >= 1, "task", "double_every must be at least 1 but is {}",
            options.double_every);
}

int64_t TaskSource::length_of(uint64_t index) const {
    if (options_.first_length == 0) return options_.length;
    int64_t length = options_.first_length;
    for (uint64_t i = index / static_cast<uint64_t>(options_.double_every); i > 0 && length < options_.length;
         --i)
        length *= 2;
    return std::min(length, options_.length);
}

void TaskSource::next(Batch& batch) {
    const uint64_t index = state_.epoch * kEpochBatches + state_.position;
    write_sequences(task_, options_.seed, TaskSplit::train, index * static_cast<uint64_t>(options_.batch),
                    options_.batch, length_of(index), batch);
    if (++state_.position == kEpochBatches) state_ = {state_.epoch + 1, 0};
}

void TaskSource::seek(SamplerState state) {
    require(state.position < kEpochBatches, "task", "position {} is not in an epoch of {}", state.position,
            kEpochBatches);
    state_ = state;
}

std::map<std::string, std::string> TaskSource::identity() const {
    const std::string length =
        options_.first_length == 0
            ? std::to_string(options_.length)
            : fmt::format("{}, doubled every {} batches up to {}", options_.first_length,
                          options_.double_every, options_.length);
    return {{"task", std::string(task_.name)},
            {"length", length},
            {"batch", std::to_string(options_.batch)},
            {"seed", std::to_string(options_.seed)}};
}

}  // namespace ssm
