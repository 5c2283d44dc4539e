// Tasks on top of the trainer: batches, evaluation by pieces, training that learns and resumes.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "ssm/models/registry.h"
#include "ssm/tasks/evaluate_task.h"
#include "ssm/tasks/task_source.h"
#include "ssm/train/trained_language_model.h"
#include "ssm/train/trainer.h"
#include "tests/support/compare.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using test::error_of;
using test::read_file;
using test::TempFolder;

std::unique_ptr<LanguageModel> model_of(const char* architecture, int64_t e, int64_t vocab = 16,
                                        uint64_t seed = 1) {
    const NewModel shape{.vocab = vocab, .e = e, .layers = 2, .n = 8, .p = 8};
    auto model = build_model(find_architecture(architecture).new_config(shape), "config");
    model->initialise(seed);
    return model;
}

TEST(TaskSource, ABatchIsAFunctionOfSeedAndIndex) {
    const Task& task = find_task("induction-heads");
    TaskSource a(task, {.length = 20, .batch = 4, .seed = 1}), b(task, {.length = 20, .batch = 8, .seed = 1});
    Batch x, y;
    std::vector<int32_t> ids, targets;
    for (int i = 0; i < 6; ++i) {
        a.next(x);
        EXPECT_EQ(x.tokens(), 80);
        EXPECT_EQ(x.counted(), 4);
        EXPECT_EQ(x.cu_seqlens, (std::vector<int64_t>{0, 20, 40, 60, 80}));
        ids.insert(ids.end(), x.ids.begin(), x.ids.end());
        targets.insert(targets.end(), x.targets.begin(), x.targets.end());
    }
    for (size_t i = 0; i < 3; ++i) {
        b.next(y);
        EXPECT_TRUE(std::equal(y.ids.begin(), y.ids.end(), ids.begin() + i * 160));
        EXPECT_TRUE(std::equal(y.targets.begin(), y.targets.end(), targets.begin() + i * 160));
    }
    // Into the next "epoch" and back.
    a.seek({0, TaskSource::kEpochBatches - 1});
    a.next(x);
    const Batch before = x;
    EXPECT_EQ(a.state(), (SamplerState{1, 0}));
    a.next(x);
    EXPECT_NE(x.ids, before.ids);
    const Batch after = x;
    a.seek({1, 0});
    a.next(x);
    EXPECT_EQ(x.ids, after.ids);
    EXPECT_EQ(error_of([&] {
                  a.seek({0, TaskSource::kEpochBatches});
              }),
              "[task] position 8192 is not in an epoch of 8192");
}

TEST(TaskSource, LengthsGrow) {
    const Task& task = find_task("induction-heads");
    TaskSource source(task, {.length = 70, .batch = 2, .seed = 1, .first_length = 16, .double_every = 3});
    Batch batch, again, whole;
    std::vector<int64_t> lengths;
    for (int i = 0; i < 12; ++i) {
        source.next(batch);
        lengths.push_back(batch.tokens() / 2);
        write_sequences(task, 1, TaskSplit::train, static_cast<uint64_t>(2 * i), 2, lengths.back(), whole);
        EXPECT_EQ(batch.ids, whole.ids);
    }
    EXPECT_EQ(lengths, (std::vector<int64_t>{16, 16, 16, 32, 32, 32, 64, 64, 64, 70, 70, 70}));
    source.seek({0, 5});
    source.next(again);
    EXPECT_EQ(again.tokens(), 2 * 32);
    EXPECT_EQ(source.tokens_per_batch(), 2 * 70);
    EXPECT_EQ(source.identity().at("length"), "16, doubled every 3 batches up to 70");
}

TEST(TaskSource, SeedsAndSplitsDiffer) {
    for (const Task& task : tasks()) {
        std::vector<std::vector<int32_t>> seen;
        for (const uint64_t seed : {0, 1}) {
            for (const TaskSplit split : {TaskSplit::train, TaskSplit::valid, TaskSplit::eval}) {
                Batch batch;
                write_sequences(task, seed, split, 0, 2, 64, batch);
                seen.emplace_back(batch.ids.begin(), batch.ids.begin() + 64);
                seen.emplace_back(batch.ids.begin() + 64, batch.ids.end());
            }
        }
        std::ranges::sort(seen);
        EXPECT_EQ(std::ranges::adjacent_find(seen), seen.end()) << task.name;
    }
}

TEST(TaskSource, Errors) {
    EXPECT_EQ(error_of([] { find_task("parity"); }),
              "[task] unknown task 'parity'; known: induction-heads, selective-copying");
    EXPECT_EQ(error_of([] { TaskSource(find_task("induction-heads"), {.length = 2}); }),
              "[task] 'induction-heads' needs a length of at least 3 but it is 2");
    EXPECT_EQ(error_of([] { TaskSource(find_task("selective-copying"), {.length = 31}); }),
              "[task] 'selective-copying' needs a length of at least 32 but it is 31");
    EXPECT_EQ(error_of([] { TaskSource(find_task("selective-copying"), {.length = 32, .batch = 0}); }),
              "[task] batch must be at least 1 but is 0");
    EXPECT_EQ(error_of([] {
                  TaskSource(find_task("induction-heads"),
                             {.length = 9, .first_length = 10, .double_every = 1});
              }),
              "[task] 'induction-heads' needs a first length in [3, 9] but it is 10");
    EXPECT_EQ(error_of([] { TaskSource(find_task("induction-heads"), {.length = 9, .first_length = 3}); }),
              "[task] double_every must be at least 1 but is 0");
}

// Every logit of every position, compared by hand.
TaskAccuracy reference(const Exec& ex, LanguageModel& model, const Task& task, const EvaluateTaskOptions& o) {
    TaskAccuracy a{.length = o.length, .sequences = o.sequences};
    for (int64_t i = 0; i < o.sequences; ++i) {
        Batch batch;
        write_sequences(task, o.seed, o.split, static_cast<uint64_t>(i), 1, o.length, batch);
        Ctx ctx{.exec = ex, .cu_seqlens = batch.cu_seqlens};
        const Var hidden = model.hidden(ctx, {batch.ids.data(), {o.length}}, nullptr);
        const Tensor logits = model.logits(ctx, hidden.value());
        bool all = true;
        for (int64_t t = 0; t < o.length; ++t) {
            const int32_t target = batch.targets[t];
            if (target < 0) continue;
            const float* row = logits.data<float>() + t * model.vocab();
            double sum = 0;
            for (int64_t j = 0; j < model.vocab(); ++j) sum += std::exp(static_cast<double>(row[j]));
            a.nll += std::log(sum) - static_cast<double>(row[target]);
            const bool right = std::max_element(row, row + model.vocab()) - row == target;
            a.right += right;
            all = all && right;
            ++a.answers;
        }
        a.right_sequences += all;
    }
    return a;
}

TEST(EvaluateTask, MatchesReferenceInPiecesOfAnySize) {
    const Exec ex = make_cpu_exec(1);
    for (const char* architecture : {"mamba", "mamba2"}) {
        for (const Task& task : tasks()) {
            const auto model = model_of(architecture, 16);
            // Louder, so that answers differ from sequence to sequence.
            model->visit([](const std::string&, Parameter& p) {
                for (int64_t i = 0; i < p.value().size(); ++i) p.value().data<float>()[i] *= 1.5f;
            });
            // 20 sequences: one group of 16 and a rest, where they are read in pieces.
            EvaluateTaskOptions o{.length = 75, .sequences = 20, .seed = 4};
            const TaskAccuracy want = reference(ex, *model, task, o);
            EXPECT_GT(want.answers, 0);
            for (const int64_t batch_tokens : {1, 48, 64, 74, 75, 300, 100000}) {
                o.batch_tokens = batch_tokens;
                const TaskAccuracy got = evaluate_task(ex, *model, task, o);
                EXPECT_EQ(got.answers, want.answers) << batch_tokens;
                EXPECT_EQ(got.right, want.right) << batch_tokens;
                EXPECT_EQ(got.right_sequences, want.right_sequences) << batch_tokens;
                EXPECT_NEAR(got.nll, want.nll, 1e-4 * want.nll) << batch_tokens;
            }
        }
    }
}

TEST(EvaluateTask, MemoryDoesNotGrowWithTheLength) {
    Exec ex = make_cpu_exec(1);
    const auto model = model_of("mamba", 16);
    const auto peak = [&](int64_t length) {
        evaluate_task(ex, *model, tasks()[0], {.length = length, .sequences = 2, .batch_tokens = 256});
        return ex.allocator->peak_bytes();
    };
    const size_t first = peak(512);
    EXPECT_GT(first, 0u);
    EXPECT_EQ(peak(16384), first);
}

TEST(EvaluateTask, Errors) {
    const Exec ex = make_cpu_exec(1);
    const auto model = model_of("mamba", 16), small = model_of("mamba", 16, 15);
    const Task& task = find_task("induction-heads");
    EXPECT_EQ(error_of([&] { evaluate_task(ex, *model, task, {.length = 2}); }),
              "[task] 'induction-heads' needs a length of at least 3 but it is 2");
    EXPECT_EQ(error_of([&] { evaluate_task(ex, *model, task, {.length = 9, .sequences = 0}); }),
              "[task] at least 1 sequence is needed but there are 0");
    EXPECT_EQ(error_of([&] { require_fits(*small, task); }),
              "[task] the model's vocabulary is 15 but 'induction-heads' has 16 tokens");
    EXPECT_EQ(error_of([&] { require_fits(*model, task); }), "(no error)");
    model->visit([](const std::string& name, Parameter& p) {
        if (name.ends_with("norm_f.weight"))
            p.value().data<float>()[3] = std::numeric_limits<float>::quiet_NaN();
    });
    EXPECT_EQ(error_of([&] { evaluate_task(ex, *model, task, {.length = 9, .sequences = 2}); }),
              "[task] the likelihood of an answer at length 9 is NaN");
}

TEST(FirstSteps, AreDrawnFromTheirRange) {
    for (const char* architecture : {"mamba", "mamba2"}) {
        NewModel shape{.vocab = 16, .e = 64, .layers = 2, .p = 8};
        const auto range = [&] {
            const std::string config = find_architecture(architecture).new_config(shape);
            EXPECT_EQ(config.find("time_step_min") != std::string::npos, shape.dt_min > 0);
            auto model = build_model(config, "config");
            model->initialise(1);
            double low = 1e9, high = 0;
            model->visit([&](const std::string& name, Parameter& p) {
                if (!name.ends_with("dt_proj.bias") && !name.ends_with("dt_bias")) return;
                for (int64_t i = 0; i < p.value().size(); ++i) {
                    const double dt = std::log1p(std::exp(static_cast<double>(p.value().data<float>()[i])));
                    low = std::min(low, dt);
                    high = std::max(high, dt);
                }
            });
            return std::pair(low, high);
        };
        const auto [usual_low, usual_high] = range();
        EXPECT_GT(usual_low, 0.99e-3);
        EXPECT_LT(usual_low, 1.6e-2);
        EXPECT_LT(usual_high, 1.01e-1);
        shape.dt_min = 1e-9;
        shape.dt_max = 1e-8;
        const auto [low, high] = range();
        EXPECT_GT(low, 0.99e-9);
        EXPECT_LT(high, 1.01e-8);
        EXPECT_GT(high, 2 * low);
        shape.dt_min = 1;
        EXPECT_EQ(error_of([&] { range(); }), "[model] step sizes from 1 to 1e-08 are no range");
    }
}

class TaskTraining : public ::testing::Test {
protected:
    TrainSummary train(const std::string& out, const std::string& name, LanguageModel& model,
                       TaskSourceOptions source, int64_t steps, double rate,
                       const std::atomic<bool>* stop = nullptr) {
        const Task& task = find_task(name);
        TrainOptions o;
        o.out = dir_ / out;
        o.steps = steps;
        o.schedule = {.peak = rate, .floor = rate, .warmup = 0};
        o.optimizer = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0};
        o.log_every = 100;
        o.checkpoint_every = 0;
        o.valid_every = 0;
        TrainedLanguageModel trained(exec_, model);
        auto valid = std::make_unique<TaskValidator>(
            exec_, model, task,
            EvaluateTaskOptions{.length = source.length, .sequences = 128, .split = TaskSplit::valid});
        return Trainer(exec_, trained, std::make_unique<TaskSource>(task, source), std::move(valid), o, true,
                       nullptr)
            .run(stop);
    }
    TempFolder dir_;
    Exec exec_ = make_cpu_exec(1);
};

TEST_F(TaskTraining, LearnsInductionHeadsAndLongerOnesToo) {
    const auto model = model_of("mamba", 32);
    const TrainSummary s = train("run", "induction-heads", *model, {.length = 16, .batch = 16}, 600, 5e-3);
    ASSERT_TRUE(s.valid.has_value());
    EXPECT_GT(s.valid->accuracy.value(), 0.9) << "chance: 0.07";
    EXPECT_EQ(s.valid->tokens, 128);
    EXPECT_FALSE(s.valid->bits_per_byte.has_value());
    // The folder is a model folder; what it learned holds at twice the length.
    const auto loaded = load_model(dir_ / "run", DType::f32);
    const TaskAccuracy a =
        evaluate_task(exec_, *loaded, find_task("induction-heads"), {.length = 32, .sequences = 128});
    EXPECT_GT(a.accuracy(), 0.7);
    const std::string metrics = read_file(dir_ / "run/metrics.jsonl");
    EXPECT_NE(metrics.find("\"accuracy\":"), std::string::npos);
    EXPECT_EQ(metrics.find("bits_per_byte"), std::string::npos);
}

TEST_F(TaskTraining, ResumedEqualsUninterrupted) {
    for (const char* name : {"induction-heads", "selective-copying"}) {
        const std::string whole = std::string(name) + "-whole", parts = std::string(name) + "-parts";
        const auto model = model_of("mamba", 16);
        train(whole, name, *model, {.length = 40, .batch = 2, .seed = 9}, 6, 1e-3);
        for (int round = 0; round < 6; ++round) {
            const auto fresh = model_of("mamba", 16, 16, round == 0 ? 1 : 50);
            const std::atomic<bool> stop = true;
            train(parts, name, *fresh, {.length = 40, .batch = 2, .seed = 9}, 6, 1e-3, &stop);
        }
        for (const char* file : {"model.safetensors", "optimizer.safetensors", "trainer.json"}) {
            EXPECT_EQ(read_file(dir_ / parts / "last" / file), read_file(dir_ / whole / "last" / file))
                << name << " " << file;
        }
        const auto other = model_of("mamba", 16);
        EXPECT_EQ(error_of([&] {
                      train(parts, "induction-heads", *other, {.length = 41, .batch = 2}, 6, 1e-3);
                  }).substr(0, 22),
                  "[train] cannot resume ");
    }
}

}  // namespace
}  // namespace ssm
