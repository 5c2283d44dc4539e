// Batches of a task for the trainer: sequences 0, 1, 2, ... of a seed, each made when it is asked for.
#pragma once

#include "ssm/tasks/task.h"
#include "ssm/train/batch_source.h"

namespace ssm {

// `length` tokens a sequence. With `first_length` > 0 a run begins with that and doubles it every
// `double_every` batches until it is there: a long task is learnt soonest where it is short.
struct TaskSourceOptions {
    int64_t length = 256, batch = 8;
    uint64_t seed = 0;
    int64_t first_length = 0, double_every = 0;
};

// Sequences first .. first + count of a split, whole, side by side.
void write_sequences(const Task& task, uint64_t seed, TaskSplit split, uint64_t first, int64_t count,
                     int64_t length, Batch& batch);

class TaskSource final : public BatchSource {
public:
    // Batches of an "epoch", a name for the count alone: the data never repeat.
    static constexpr uint64_t kEpochBatches = 8192;

    // Throws when a length has no room for the task.
    TaskSource(const Task& task, TaskSourceOptions options);

    void next(Batch& batch) override;
    SamplerState state() const override { return state_; }
    void seek(SamplerState state) override;
    uint64_t epoch_size() const override { return kEpochBatches; }
    int64_t tokens_per_batch() const override { return options_.batch * options_.length; }
    std::map<std::string, std::string> identity() const override;

private:
    int64_t length_of(uint64_t index) const;  // of the sequences in that batch

    const Task& task_;
    TaskSourceOptions options_;
    SamplerState state_;
};

}  // namespace ssm
