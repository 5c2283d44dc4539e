// How often a model answers a task rightly, at any length.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/models/language_model.h"
#include "ssm/tasks/task.h"
#include "ssm/train/validator.h"

namespace ssm {

struct EvaluateTaskOptions {
    int64_t length = 256;
    int64_t sequences = 256;
    uint64_t seed = 0;
    TaskSplit split = TaskSplit::eval;
    int64_t batch_tokens = 8192;    // read together; longer sequences are read in pieces
    DType activation = DType::f32;  // between the layers
    bool training = false;          // weights change between calls: keep nothing that is made of them
};

struct TaskAccuracy {
    int64_t length = 0, sequences = 0;
    int64_t answers = 0, right = 0;  // positions that count; the largest logit is the target's
    int64_t right_sequences = 0;     // every answer right
    double nll = 0;                  // sum over the answers, in nats
    double seconds = 0;
    double accuracy() const { return static_cast<double>(right) / static_cast<double>(answers); }
    double sequence_accuracy() const {
        return static_cast<double>(right_sequences) / static_cast<double>(sequences);
    }
    double mean_nll() const { return nll / static_cast<double>(answers); }
};

// Sequences 0 .. sequences-1 of a split. Memory depends on batch_tokens, not on the length: a sequence longer
// than that is made and read in pieces, several sequences side by side, the state carried from piece to
// piece. Logits are computed, and answers copied to the host, only where they count. Throws Error(numeric) at
// the first NaN.
TaskAccuracy evaluate_task(const Exec& ex, LanguageModel& model, const Task& task,
                           const EvaluateTaskOptions& options);

// Throws when the model cannot be asked this task.
void require_fits(const LanguageModel& model, const Task& task);

// Accuracy and loss on a fixed set while a model trains.
class TaskValidator final : public Validator {
public:
    // `model` must outlive this.
    TaskValidator(Exec exec, LanguageModel& model, const Task& task, EvaluateTaskOptions options)
        : exec_(std::move(exec)), model_(model), task_(task), options_(options) {}
    Validation validate() override;

private:
    Exec exec_;
    LanguageModel& model_;
    const Task& task_;
    EvaluateTaskOptions options_;
};

}  // namespace ssm
