#include "ssm/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "ssm/io/atomic_file.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/safetensors/checkpoint.h"

namespace ssm {
namespace fs = std::filesystem;

namespace {

using Json = nlohmann::ordered_json;
constexpr const char* kState = "trainer.json";
constexpr const char* kOptimizer = "optimizer.safetensors";

class Stopwatch {
public:
    double seconds() const {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    }

private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void add_identity(TrainOptions& o, const BatchSource& source) {
    o.identity.merge(source.identity());
    o.identity["accumulate"] = std::to_string(o.accumulate);
}

void check(const TrainOptions& o) {
    require(o.accumulate >= 1, "train", "accumulate must be at least 1 but is {}", o.accumulate);
    require(o.steps >= 0 && o.tokens >= 0 && o.minutes >= 0, "train", "a limit of the run is negative");
    require(o.steps > 0 || o.tokens > 0 || o.minutes > 0, "train",
            "a run needs an end: steps, tokens or minutes");
    require(o.optimizer.clip >= 0, "train", "clip must not be negative but is {}", o.optimizer.clip);
    require(o.keep >= 1, "train", "keep must be at least 1 but is {}", o.keep);
    require(std::isfinite(o.schedule.peak) && o.schedule.peak > 0, "train",
            "the learning rate must be positive but is {}", o.schedule.peak);
    require(o.schedule.floor >= 0 && o.schedule.floor <= o.schedule.peak, "train",
            "the lowest learning rate {} is not in [0, {}]", o.schedule.floor, o.schedule.peak);
    require(o.schedule.warmup >= 0, "train", "warmup must not be negative but is {}", o.schedule.warmup);
}

}  // namespace

Trainer::Trainer(Exec exec, Trainable& model, std::unique_ptr<BatchSource> train,
                 std::unique_ptr<Validator> valid, TrainOptions options, bool resume, std::FILE* progress)
    : exec_(std::move(exec)),
      model_(model),
      source_(std::move(train)),
      valid_(std::move(valid)),
      options_((check(options), std::move(options))),
      folder_(options_.out),
      optimizer_(exec_, model.parameters(), options_.optimizer),
      replay_(exec_),
      progress_(progress),
      batches_(static_cast<size_t>(options_.accumulate)) {
    add_identity(options_, *source_);
    const auto latest = RunFolder::latest(options_.out);
    if (latest && !resume) {
        fail(ErrorCode::invalid_argument, "train",
             "`{}` has a run already (step {}); continue it with --resume or choose another folder",
             options_.out.string(), std::stoll(latest->filename().string().substr(5)));
    }
    if (latest) resume_from(*latest);
    std::optional<MetricsRow> last;
    metrics_ = std::make_unique<MetricsLog>(options_.out / "metrics.jsonl", step_, last);
    if (last) {
        seconds_ = last->seconds;
        loss_ = last->loss;
        rate_ = last->learning_rate;
        tokens_per_second_ = last->tokens_per_second;
    }
    start_share_ = share();
    start_seconds_ = seconds_;
    optimizer_.zero_gradients();
    if (!latest) {
        write_checkpoint();
        require_room(checkpoint_);
    }
}

void Trainer::require_room(const fs::path& checkpoint) const {
    uintmax_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(checkpoint)) bytes += entry.file_size();
    std::error_code error;
    const fs::space_info space = fs::space(options_.out, error);
    const uintmax_t need = bytes * static_cast<uintmax_t>(options_.keep);
    if (!error && space.available < need) {
        fail(ErrorCode::io, "train", "`{}` has {} MB free but {} checkpoints need {} MB more",
             options_.out.string(), space.available / 1000000, options_.keep, need / 1000000 + 1);
    }
}

void Trainer::resume_from(const fs::path& checkpoint) {
    const fs::path file = checkpoint / kState;
    const Json state = Json::parse(read_text_file(file), nullptr, false);
    SamplerState sampler;
    try {
        const auto identity = state.at("identity").get<std::map<std::string, std::string>>();
        for (const auto& [name, value] : options_.identity) {
            const auto was = identity.find(name);
            require(was != identity.end() && was->second == value, "train",
                    "cannot resume `{}`: `{}` was {} but is {} now", options_.out.string(), name,
                    was == identity.end() ? "absent" : was->second, value);
        }
        step_ = state.at("step").get<int64_t>();
        tokens_ = state.at("tokens").get<int64_t>();
        sampler = {state.at("sampler").at("epoch").get<uint64_t>(),
                   state.at("sampler").at("position").get<uint64_t>()};
    } catch (const nlohmann::json::exception&) {
        fail(ErrorCode::bad_file, "train", "`{}` is not a trainer's state", file.string());
    }
    source_->seek(sampler);
    Checkpoint weights = Checkpoint::open(checkpoint);
    for (const TrainedParameter& p : optimizer_.parameters()) {
        p.value.copy_from(weights.tensor(p.name, p.value.shape()));
    }
    weights.require_all_claimed();
    optimizer_.round_parameters();
    optimizer_.load(checkpoint / kOptimizer);
    checkpoint_ = checkpoint;
}

void Trainer::write_checkpoint() {
    metrics_->sync();
    checkpoint_ = folder_.write(step_, [&](const fs::path& folder) {
        model_.save(folder);
        for (const auto& [name, content] : options_.files) write_file_atomic(folder / name, content);
        optimizer_.save(folder / kOptimizer);
        const SamplerState s = source_->state();
        const Json state = {{"format", 1},
                            {"step", step_},
                            {"tokens", tokens_},
                            {"sampler", {{"epoch", s.epoch}, {"position", s.position}}},
                            {"identity", options_.identity}};
        write_file_atomic(folder / kState, state.dump(1) + '\n');
    });
    folder_.prune(options_.keep);
}

double Trainer::share() const {
    double done = 0;
    const auto of = [&](double now, double end) {
        if (end > 0) done = std::max(done, now / end);
    };
    of(static_cast<double>(step_), static_cast<double>(options_.steps));
    of(static_cast<double>(tokens_), static_cast<double>(options_.tokens));
    of(seconds_, options_.minutes * 60);
    return done;
}

// The rate of `step`, the one after step_. With a limit in steps it depends on nothing but the step.
double Trainer::rate(int64_t step) const {
    const double tokens_per_step =
        step_ > 0 ? static_cast<double>(tokens_) / static_cast<double>(step_)
                  : static_cast<double>(source_->tokens_per_batch() * options_.accumulate);
    double per_step = 0;
    if (options_.steps > 0) per_step = 1.0 / static_cast<double>(options_.steps);
    if (options_.tokens > 0)
        per_step = std::max(per_step, tokens_per_step / static_cast<double>(options_.tokens));
    const double progress = std::max(share(), per_step * static_cast<double>(step));
    return learning_rate(options_.schedule, step, progress,
                         per_step * static_cast<double>(options_.schedule.warmup));
}

// Asks for a step. On a GPU it runs while the host prepares the next, and what came of it is looked at then.
void Trainer::take_step() {
    const Stopwatch watch;
    int64_t total = 0, counted = 0;
    std::vector<int64_t> shape;
    for (Batch& b : batches_) {
        source_->next(b);
        total += b.tokens();
        counted += b.counted();
        shape.insert(shape.end(), b.cu_seqlens.begin(), b.cu_seqlens.end());
    }
    std::vector<double> weights;
    for (const Batch& b : batches_)
        weights.push_back(static_cast<double>(b.counted()) /
                          static_cast<double>(std::max<int64_t>(counted, 1)));
    model_.set_batches(batches_, weights);
    rate_ = rate(step_ + 1);
    optimizer_.set_rate(step_ + 1, rate_);
    replay_.run(shape, [&] {
        model_.add_gradients(optimizer_.loss());
        optimizer_.step();
    });
    settle();
    optimizer_.request();
    unsettled_ = ++step_;
    if (exec_.device == Device::cpu) settle();
    tokens_ += total;
    since_.tokens += total;
    count(watch.seconds());
}

void Trainer::settle() {
    if (unsettled_ == 0) return;
    const Optimizer::Status s = optimizer_.status();
    const int64_t step = std::exchange(unsettled_, 0);
    if (!std::isfinite(s.loss) || !std::isfinite(s.norm)) stop_not_finite(step, s);
    norm_ = s.norm;
    since_.loss += s.loss;
    ++since_.steps;
}

void Trainer::count(double seconds) {
    since_.seconds += seconds;
    seconds_ += seconds;
}

void Trainer::stop_not_finite(int64_t step, Optimizer::Status s) const {
    const TrainedParameter* broken = optimizer_.broken_gradient();
    const std::string where = broken != nullptr
                                  ? fmt::format("the gradient of `{}` is not finite", broken->name)
                                  : fmt::format("the norm of the gradients is {}", s.norm);
    fail(ErrorCode::numeric, "train", "step {}: the loss is {}, {}; the last good checkpoint is `{}`", step,
         s.loss, where, checkpoint_.string());
}

ProgressStatus Trainer::status() const {
    const double now = share(), done = now - start_share_;
    ProgressStatus s;
    s.step = step_;
    s.share = now;
    s.loss = since_.steps > 0 ? since_.loss / static_cast<double>(since_.steps) : loss_;
    s.learning_rate = rate_;
    s.tokens_per_second =
        since_.seconds > 0 ? static_cast<double>(since_.tokens) / since_.seconds : tokens_per_second_;
    s.peak_share =
        options_.peak_flops > 0 ? s.tokens_per_second * model_.flop_per_token() / options_.peak_flops : 0;
    s.memory = exec_.allocator->peak_bytes();
    s.seconds_left = done > 0 ? (seconds_ - start_seconds_) * (1 - now) / done : NAN;
    return s;
}

void Trainer::write_row(std::optional<Validation> valid) {
    if (since_.steps > 0) {
        loss_ = since_.loss / static_cast<double>(since_.steps);
        tokens_per_second_ = static_cast<double>(since_.tokens) / since_.seconds;
    }
    const SamplerState s = source_->state();
    MetricsRow row{.step = step_,
                   .tokens = tokens_,
                   .epoch = static_cast<double>(s.epoch) +
                            static_cast<double>(s.position) / static_cast<double>(source_->epoch_size()),
                   .loss = loss_,
                   .learning_rate = rate_,
                   .gradient_norm = norm_,
                   .tokens_per_second = tokens_per_second_,
                   .seconds = seconds_,
                   .valid_loss = {},
                   .bits_per_byte = {},
                   .accuracy = {}};
    ProgressStatus shown = status();
    if (valid) {
        shown.valid_loss = row.valid_loss = valid->loss;
        shown.bits_per_byte = row.bits_per_byte = valid->bits_per_byte;
        shown.accuracy = row.accuracy = valid->accuracy;
    }
    metrics_->append(row);
    progress_.report(shown);
    since_ = {};
}

TrainSummary Trainer::run(const std::atomic<bool>* stop) {
    const int64_t first_tokens = tokens_;
    const double first_seconds = seconds_;
    bool stopped = false;
    while (!stopped && share() < 1) {
        take_step();
        const bool last = share() >= 1;
        stopped = !last && stop != nullptr && stop->load();
        const bool validated = valid_ != nullptr && due(options_.valid_every, last) && !stopped;
        const bool saved = due(options_.checkpoint_every, last || stopped);
        const bool logged = validated || saved || due(options_.log_every, last);
        if (logged) {
            const Stopwatch watch;
            settle();
            count(watch.seconds());
        }
        if (validated) last_valid_ = validate();
        if (logged) {
            write_row(validated ? last_valid_ : std::nullopt);
        } else {
            progress_.update(status());
        }
        if (saved) write_checkpoint();
    }
    TrainSummary summary{.step = step_, .tokens = tokens_, .loss = loss_, .seconds = seconds_};
    const double seconds = seconds_ - first_seconds;
    summary.tokens_per_second = seconds > 0 ? static_cast<double>(tokens_ - first_tokens) / seconds : 0;
    summary.valid = last_valid_;
    summary.checkpoint = checkpoint_;
    summary.stopped = stopped;
    return summary;
}

}  // namespace ssm
