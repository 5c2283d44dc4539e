// The trainer: batches -> gradients of `accumulate` batches -> clipping -> AdamW, with validation,
// checkpoints and metrics.
//
//   gradient  g = sum_i (n_i / n) grad mean_nll_i      over the batches i of a step, n_i counted targets each
//   clipping  g * min(1, clip / ||g||)
//
// Everything that decides the next step is in a checkpoint, so a resumed run continues to the same bytes as
// one that was not interrupted (runs limited by time excepted: their learning rate follows the clock).
#pragma once

#include <atomic>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/replay.h"
#include "ssm/train/batch_source.h"
#include "ssm/train/metrics.h"
#include "ssm/train/optimizer.h"
#include "ssm/train/progress.h"
#include "ssm/train/run_folder.h"
#include "ssm/train/schedule.h"
#include "ssm/train/trainable.h"
#include "ssm/train/validator.h"

namespace ssm {

struct TrainOptions {
    std::filesystem::path out;
    int64_t accumulate = 1;
    // The end: the first of these that is reached; 0: no such limit.
    int64_t steps = 0, tokens = 0;
    double minutes = 0;
    Schedule schedule;
    OptimizerOptions optimizer;
    double peak_flops = 0;  // of the machine, for the progress line's share of it; 0: not known
    int64_t log_every = 10, checkpoint_every = 1000, valid_every = 500;  // steps; 0: only at the end
    int64_t keep = 2;                                                    // checkpoints
    // What must be the same when the run is resumed, beside what the source says; by name, for the message.
    std::map<std::string, std::string> identity;
    // Written beside the model: name -> content (tokenizer.json).
    std::map<std::string, std::string> files;
};

struct TrainSummary {
    int64_t step = 0, tokens = 0;
    double loss = 0;  // of the last line of metrics
    double seconds = 0, tokens_per_second = 0;
    std::optional<Validation> valid;
    std::filesystem::path checkpoint;
    bool stopped = false;  // asked to, before the end
};

class Trainer {
public:
    // `valid` may be null. Opens the folder. With `resume` continues from its newest checkpoint if there is
    // one; without, a folder that has checkpoints is refused. Throws Error (io, invalid_argument) before any
    // work is done; in a new run the first checkpoint, of step 0, shows that the disk can be written.
    Trainer(Exec exec, Trainable& model, std::unique_ptr<BatchSource> train, std::unique_ptr<Validator> valid,
            TrainOptions options, bool resume, std::FILE* progress);

    // To the end, or until `stop` becomes true: then the step is finished and a checkpoint written. Throws
    // Error (numeric) when the loss or a gradient is not finite, naming the step, the parameter and the last
    // checkpoint.
    TrainSummary run(const std::atomic<bool>* stop = nullptr);

    Validation validate() { return valid_->validate(); }
    int64_t step() const { return step_; }
    int64_t tokens() const { return tokens_; }

private:
    struct Since {  // since the last line of metrics
        double loss = 0, seconds = 0;
        int64_t steps = 0, tokens = 0;
    };
    void resume_from(const std::filesystem::path& checkpoint);
    void require_room(const std::filesystem::path& checkpoint) const;
    double share() const;
    double rate(int64_t step) const;
    void take_step();
    void settle();  // the loss and the norm of the step that was asked for last; waits for it
    void count(double seconds);
    [[noreturn]] void stop_not_finite(int64_t step, Optimizer::Status status) const;
    void write_row(std::optional<Validation> valid);
    void write_checkpoint();
    ProgressStatus status() const;
    bool due(int64_t every, bool last) const { return last || (every > 0 && step_ % every == 0); }

    Exec exec_;
    Trainable& model_;
    std::unique_ptr<BatchSource> source_;
    std::unique_ptr<Validator> valid_;
    TrainOptions options_;
    RunFolder folder_;
    Optimizer optimizer_;
    Replay replay_;
    std::unique_ptr<MetricsLog> metrics_;
    Progress progress_;
    std::vector<Batch> batches_;

    int64_t step_ = 0, tokens_ = 0;
    int64_t unsettled_ = 0;  // the step whose loss was not looked at yet; 0: none
    double seconds_ = 0;     // of work, over all resumptions
    double start_share_ = 0, start_seconds_ = 0;
    double loss_ = 0, norm_ = 0, rate_ = 0, tokens_per_second_ = 0;
    Since since_;
    std::optional<Validation> last_valid_;
    std::filesystem::path checkpoint_;
};

}  // namespace ssm
