#include "ssm/tasks/task_source.h"

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
    require(options.batch >= 1, "task", "batch must be at least 1 but is {}", options.batch);
    require(options.length >= task.shortest, "task", "'{}' needs a length of at least {} but it is {}",
            task.name, task.shortest, options.length);
}

void TaskSource::next(Batch& batch) {
    const auto per_batch = static_cast<uint64_t>(options_.batch);
    const uint64_t first = (state_.epoch * kEpochBatches + state_.position) * per_batch;
    write_sequences(task_, options_.seed, TaskSplit::train, first, options_.batch, options_.length, batch);
    if (++state_.position == kEpochBatches) state_ = {state_.epoch + 1, 0};
}

void TaskSource::seek(SamplerState state) {
    require(state.position < kEpochBatches, "task", "position {} is not in an epoch of {}", state.position,
            kEpochBatches);
    state_ = state;
}

std::map<std::string, std::string> TaskSource::identity() const {
    return {{"task", std::string(task_.name)},
            {"length", std::to_string(options_.length)},
            {"batch", std::to_string(options_.batch)},
            {"seed", std::to_string(options_.seed)}};
}

}  // namespace ssm
