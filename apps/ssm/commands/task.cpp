#include "apps/ssm/commands/task.h"

#include <algorithm>
#include <cstdio>
#include <memory>

#include <fmt/format.h>

#include "apps/ssm/commands/common.h"
#include "apps/ssm/commands/run_recipe.h"
#include "apps/ssm/commands/stop_on_signal.h"
#include "ssm/io/atomic_file.h"
#include "ssm/models/registry.h"
#include "ssm/tasks/evaluate_task.h"
#include "ssm/tasks/task_source.h"
#include "ssm/train/hash.h"
#include "ssm/train/trained_language_model.h"
#include "ssm/train/trainer.h"

namespace ssm::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// 0 (or nothing) where the task's recipe decides.
struct Options {
    RunOptions run;
    std::string name, out, eval, arch = "mamba";
    NewModel shape{.vocab = 0, .e = 0, .layers = 0};
    TaskSourceOptions source{.length = 0, .batch = 0};
    TrainOptions train;
    std::vector<int64_t> eval_lengths;
    int64_t eval_sequences = 1024, eval_tokens = int64_t{1} << 24, valid_sequences = 256, valid_length = 0;
    bool resume = false, quiet = false;
};

void fill_from(const TaskRecipe& r, Options& o) {
    const auto otherwise = [](int64_t& value, int64_t recipe) { value = value > 0 ? value : recipe; };
    otherwise(o.shape.e, r.e);
    otherwise(o.shape.layers, r.layers);
    if (o.source.length == 0 && o.source.first_length == 0) {
        o.source.first_length = r.first_length;
        o.source.double_every = r.double_every;
    }
    otherwise(o.source.length, r.length);
    otherwise(o.source.batch, r.batch);
    if (o.train.minutes == 0) otherwise(o.train.steps, r.steps);
    Schedule& s = o.train.schedule;
    if (s.peak == 0) s.peak = r.learning_rate;
    if (o.train.optimizer.eps == 0) o.train.optimizer.eps = r.eps;
    if (o.shape.dt_min == 0 && o.shape.dt_max == 0) {
        o.shape.dt_min = r.dt_min;
        o.shape.dt_max = r.dt_max;
    }
    if (s.floor < 0) s.floor = r.last_learning_rate > 0 ? std::min(r.last_learning_rate, s.peak) : s.peak;
    if (o.eval_lengths.empty()) o.eval_lengths = r.eval_lengths;
}

EvaluateTaskOptions evaluation(const Options& o, const LanguageModel& model) {
    return {.seed = o.source.seed,
            .batch_tokens = o.run.device == "cuda" ? int64_t{1} << 18 : int64_t{1} << 13,
            .activation = model.dtype()};
}

Json to_json(const TaskAccuracy& a) {
    return {{"length", a.length},
            {"sequences", a.sequences},
            {"answers", a.answers},
            {"accuracy", a.accuracy()},
            {"sequence_accuracy", a.sequence_accuracy()},
            {"mean_nll", a.mean_nll()},
            {"seconds", a.seconds}};
}

// Accuracy at every length, into accuracy.json beside the model.
Json evaluate_all(const Exec& ex, LanguageModel& model, const Task& task, const Options& o,
                  const fs::path& folder) {
    Json lengths = Json::array();
    for (const int64_t length : o.eval_lengths) {
        EvaluateTaskOptions e = evaluation(o, model);
        e.length = length;
        e.sequences = std::clamp<int64_t>(o.eval_tokens / std::max<int64_t>(length, 1), 1, o.eval_sequences);
        const TaskAccuracy a = evaluate_task(ex, model, task, e);
        lengths.push_back(to_json(a));
        if (!o.quiet) {
            std::fprintf(stderr, "length %lld: %.2f%% of %lld answers right, %.1f s\n",
                         static_cast<long long>(length), 100 * a.accuracy(),
                         static_cast<long long>(a.answers), a.seconds);
        }
    }
    const Json result = {{"task", task.name},      {"chance", task.chance}, {"seed", o.source.seed},
                         {"device", o.run.device}, {"dtype", o.run.dtype},  {"lengths", lengths}};
    write_file_atomic(folder / "accuracy.json", result.dump(1) + '\n');
    return lengths;
}

void print(const Options& o, const Json& result) {
    if (o.run.json) {
        print_json(result);
        return;
    }
    for (const auto& [key, value] : result.items()) {
        if (key != "lengths") std::printf("%s %s\n", key.c_str(), value.dump().c_str());
    }
    if (!result.contains("lengths")) return;
    std::printf("%8s  %9s  %8s  %9s  %9s  %9s  %7s\n", "length", "sequences", "answers", "accuracy", "whole",
                "nll", "seconds");
    for (const Json& a : result["lengths"]) {
        const std::string row = fmt::format(
            "{:>8}  {:>9}  {:>8}  {:>9.4f}  {:>9.4f}  {:>9.2e}  {:>7.1f}\n", a["length"].get<int64_t>(),
            a["sequences"].get<int64_t>(), a["answers"].get<int64_t>(), a["accuracy"].get<double>(),
            a["sequence_accuracy"].get<double>(), a["mean_nll"].get<double>(), a["seconds"].get<double>());
        std::fputs(row.c_str(), stdout);
    }
}

void evaluate_only(const Options& o, const Task& task) {
    const Exec ex = o.run.exec();
    const auto model = load_model(o.eval, o.run.type());
    require_fits(*model, task);
    model->move_to(ex);
    Json result = {{"task", task.name}, {"model", o.eval}};
    result["lengths"] = evaluate_all(ex, *model, task, o, o.eval);
    print(o, result);
}

void train(Options& o, const Task& task, const CLI::App& command) {
    Exec ex = o.run.exec();
    if (o.run.dtype == "bf16") ex.matmul = MatmulPrecision::bf16;
    o.shape.vocab = task.vocab;
    const auto model = build_model(find_architecture(o.arch).new_config(o.shape), "config");
    model->initialise(o.source.seed);
    const DType type = o.run.device == "cuda" ? o.run.type() : DType::f32;
    TrainedLanguageModel trained(ex, *model, {.dtype = type});
    o.train.identity["config"] = fmt::format("{:016x}", hash_bytes(model->spec().config));
    o.train.identity["dtype"] = o.run.dtype;
    EvaluateTaskOptions valid = evaluation(o, *model);
    valid.length = o.valid_length > 0 ? o.valid_length : o.source.length;
    valid.sequences = o.valid_sequences;
    valid.split = TaskSplit::valid;
    Trainer trainer(ex, trained, std::make_unique<TaskSource>(task, o.source),
                    std::make_unique<TaskValidator>(ex, *model, task, valid), o.train, o.resume,
                    o.quiet ? nullptr : stderr);
    if (!o.quiet) {
        std::fprintf(stderr, "%s: %lld parameters; %s at step %lld\n", model->spec().architecture.c_str(),
                     static_cast<long long>(model->parameter_count()),
                     trainer.step() > 0 ? "resumes" : "starts", static_cast<long long>(trainer.step()));
    }
    write_recipe(command, o.train.out / "recipe.json");
    const TrainSummary s = trainer.run(&stop_on_signal());
    end_on_signal();
    Json result = {{"task", task.name},
                   {"model", o.out},
                   {"parameters", model->parameter_count()},
                   {"steps", s.step},
                   {"tokens", s.tokens},
                   {"loss", s.loss},
                   {"tokens_per_second", s.tokens_per_second},
                   {"seconds", s.seconds},
                   {"stopped", s.stopped}};
    if (s.valid) result["valid_accuracy"] = s.valid->accuracy.value();
    if (!s.stopped) result["lengths"] = evaluate_all(ex, *model, task, o, o.train.out);
    print(o, result);
}

void start(CLI::App& command, Options& o) {
    const Task& task = find_task(o.name);
    require(o.out.empty() != o.eval.empty(), "task",
            "give either --out DIR to train in or --eval DIR, a trained model");
    const fs::path saved = fs::path(o.out) / "recipe.json";
    if (o.resume && fs::exists(saved)) apply_recipe(command, saved);
    fill_from(task.recipe, o);
    for (const int64_t length : o.eval_lengths) {
        require(length >= task.shortest, "task", "'{}' needs a length of at least {} but it is {}", task.name,
                task.shortest, length);
    }
    if (!o.eval.empty()) {
        evaluate_only(o, task);
        return;
    }
    o.train.out = o.out;
    train(o, task, command);
}

void add_model_options(CLI::App& c, Options& o) {
    c.add_option("--arch", o.arch, "Architecture: mamba, mamba2, falcon_mamba")->capture_default_str();
    c.add_option("--d-model", o.shape.e, "Width")->check(kPositive);
    c.add_option("--layers", o.shape.layers, "Layers")->check(kPositive);
    c.add_option("--d-state", o.shape.n, "State size; 0: the architecture's")->check(kNotNegative);
    c.add_option("--dt-min", o.shape.dt_min, "First step sizes: from")->check(kPositive);
    c.add_option("--dt-max", o.shape.dt_max, "First step sizes: to")->check(kPositive);
    c.add_option("--head-dim", o.shape.p, "Head dimension (mamba2); 0: the rule's")->check(kNotNegative);
}

void add_train_options(CLI::App& c, Options& o) {
    TrainOptions& t = o.train;
    c.add_option("--length", o.source.length, "Tokens in a sequence")->check(kPositive);
    CLI::Option* first = c.add_option("--first-length", o.source.first_length,
                                      "Begin with shorter sequences: with this length")
                             ->check(kPositive);
    CLI::Option* every = c.add_option("--double-every", o.source.double_every,
                                      "and double it every so many batches, up to --length")
                             ->check(kPositive);
    first->needs(every);
    every->needs(first);
    c.add_option("--batch", o.source.batch, "Sequences in a batch")->check(kPositive);
    c.add_option("--accumulate", t.accumulate, "Batches in a step")->check(kPositive)->capture_default_str();
    c.add_option("--seed", o.source.seed, "Of the new model and of all sequences")->capture_default_str();
    c.add_option("--steps", t.steps, "End after so many steps")->check(kPositive);
    c.add_option("--minutes", t.minutes, "End after so much time (resuming is then not exact)")
        ->check(kNotNegative);
    c.add_option("--lr", t.schedule.peak, "Learning rate")->check(kPositive);
    c.add_option("--min-lr", t.schedule.floor, "Last learning rate, by a cosine; the same as --lr: constant")
        ->check(kNotNegative);
    c.add_option("--eps", t.optimizer.eps, "Adam")->check(kPositive);
    add_loop_options(c, t);
    c.add_option("--valid-every", t.valid_every, "Steps between validations; 0: only at the end")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--valid-length", o.valid_length, "Their length; default --length")->check(kPositive);
    c.add_option("--valid-sequences", o.valid_sequences, "Sequences to validate on")
        ->check(kPositive)
        ->capture_default_str();
}

}  // namespace

void add_task(CLI::App& app) {
    auto o = std::make_shared<Options>();
    o->train.schedule = {.peak = 0, .floor = -1, .warmup = 0};
    o->train.optimizer = {.beta1 = 0.9, .beta2 = 0.999, .eps = 0, .weight_decay = 0};
    o->train.log_every = 256;
    o->train.checkpoint_every = o->train.valid_every = TaskSource::kEpochBatches;
    CLI::App* c = app.add_subcommand("task", "Train a small model on a synthetic task and test it");
    std::string names;
    for (const Task& t : tasks()) names += fmt::format("{}{}", names.empty() ? "" : ", ", t.name);
    c->footer("Needed: --out to train in, or --eval.");
    c->add_option("name", o->name, "The task: " + names + "; sizes and rates are the published ones")
        ->required();
    c->add_option("--out", o->out, "Folder of the run: checkpoints, metrics.jsonl, model, accuracy.json");
    c->add_option("--eval", o->eval, "Model folder to test, without training");
    c->add_flag("--resume", o->resume,
                "Continue the run in --out, if there is one, with its options where none are given");
    add_model_options(*c, *o);
    add_train_options(*c, *o);
    c->add_option("--eval-lengths", o->eval_lengths, "Lengths to test at: 64,1024")
        ->delimiter(',')
        ->check(kPositive);
    c->add_option("--eval-sequences", o->eval_sequences, "Sequences of each length, at most")
        ->check(kPositive)
        ->capture_default_str();
    c->add_option("--eval-tokens", o->eval_tokens, "Tokens of each length, at most (but one sequence)")
        ->check(kPositive)
        ->capture_default_str();
    o->run.add_to(*c);
    c->add_flag("--quiet", o->quiet, "No progress on stderr");
    c->callback([o, c] { start(*c, *o); });
}

}  // namespace ssm::cli
