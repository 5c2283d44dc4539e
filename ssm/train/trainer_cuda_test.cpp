// Training on the GPU against training on the CPU: the same curve, the same files.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "ssm/models/registry.h"
#include "ssm/train/bigram.h"
#include "ssm/train/recompute_test.h"
#include "ssm/train/sampler.h"
#include "ssm/train/test_files.h"
#include "ssm/train/token_file.h"
#include "ssm/train/trained_language_model.h"
#include "ssm/train/trainer.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

using test::cuda_exec;
using test::read_file;
using test::TempFolder;

struct Training {
    std::string name;
    const char* architecture = "mamba";
    Exec ex = cuda_exec();
    TrainedLanguageModel::Options model = {};
    int64_t steps = 30, accumulate = 1;
    bool packed = false, resume = false;
    bool constant = false;  // the learning rate: a run's length does not matter then
};

class TrainerCuda : public ::testing::Test {
protected:
    TrainSummary train(const Training& run) {
        const NewModel shape{.vocab = 256, .e = 32, .layers = 2, .n = 16, .p = 16, .eos = 255};
        auto model = build_model(find_architecture(run.architecture).new_config(shape), "config");
        model->initialise(7);
        TrainedLanguageModel trained(run.ex, *model, run.model);
        const Exec host = make_cpu_exec(1);
        const TokenFile tokens = TokenFile::open(
            host, test::write_text(dir_ / "train.txt", test::story(3000, 1)), dir_ / "cache", byte_encoder());
        TrainOptions o;
        o.out = dir_ / run.name;
        o.accumulate = run.accumulate;
        o.steps = run.steps;
        o.schedule = {.peak = 0.01, .floor = 0.001, .warmup = 5};
        if (run.constant) o.schedule = {.peak = 0.005, .floor = 0.005, .warmup = 0};
        o.log_every = 1;
        o.checkpoint_every = 0;
        auto source = std::make_unique<BatchSampler>(
            std::vector<WeightedFile>{{tokens, 1.0}},
            BatchSamplerOptions{.length = 64, .batch = 4, .seed = 3, .packed = run.packed});
        return Trainer(run.ex, trained, std::move(source), nullptr, o, run.resume, nullptr).run();
    }
    std::vector<double> curve(const std::string& name) {
        std::vector<double> loss;
        std::istringstream lines(read_file(dir_ / name / "metrics.jsonl"));
        for (std::string line; std::getline(lines, line);)
            loss.push_back(nlohmann::json::parse(line)["loss"]);
        return loss;
    }
    TempFolder folder_;
    std::filesystem::path dir_ = folder_.path();
};

std::string weights(const TrainSummary& s) { return read_file(s.checkpoint / "model.safetensors"); }

double furthest(const std::vector<double>& a, const std::vector<double>& b) {
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]) / b[i]);
    return worst;
}

TEST_F(TrainerCuda, TheCurveIsTheCpus) {
    for (const char* architecture : {"mamba", "mamba2"}) {
        const std::string a = architecture;
        train({.name = a + "-cpu", .architecture = architecture, .ex = make_cpu_exec(1)});
        train({.name = a + "-f32", .architecture = architecture});
        train({.name = a + "-bf16", .architecture = architecture, .model = {.dtype = DType::bf16}});
        const auto cpu = curve(a + "-cpu"), f32 = curve(a + "-f32"), half = curve(a + "-bf16");
        ASSERT_EQ(cpu.size(), 30u);
        ASSERT_EQ(f32.size(), 30u);
        ASSERT_EQ(half.size(), 30u);
        EXPECT_LT(cpu.back(), 0.7 * cpu.front());  // it learns
        EXPECT_LT(furthest(f32, cpu), 2e-3) << a;
        EXPECT_LT(furthest(half, cpu), 3e-2) << a;
        EXPECT_GT(furthest(half, cpu), 1e-6) << a << " did not compute in bf16";
    }
}

TEST_F(TrainerCuda, RecomputationGivesTheSameCurve) {
    for (const char* architecture : {"mamba", "mamba2"}) {
        const std::string a = architecture;
        train({.name = a, .architecture = architecture, .model = {.dtype = DType::bf16}});
        train({.name = a + "-again",
               .architecture = architecture,
               .model = {.dtype = DType::bf16, .recompute = Recompute::layers}});
        EXPECT_LT(furthest(curve(a + "-again"), curve(a)), 5e-3) << a;
    }
}

TEST_F(TrainerCuda, RecomputationGivesTheSameBytes) {
    for (const char* architecture : {"mamba", "mamba2", "falcon_mamba"}) {
        for (const DType dtype : {DType::f32, DType::bf16}) {
            const auto run = [&](Recompute recompute) {
                Exec ex = make_cuda_exec();
                ex.deterministic = true;
                return test::gradients_of(ex, architecture, {.dtype = dtype, .recompute = recompute});
            };
            const auto kept = run(Recompute::none), cheap = run(Recompute::cheap),
                       layers = run(Recompute::layers);
            EXPECT_EQ(cheap.bytes, kept.bytes) << architecture << " " << name_of(dtype);
            EXPECT_EQ(layers.bytes, kept.bytes) << architecture << " " << name_of(dtype);
        }
    }
}

// Windows are captured as a graph, packed documents are not; both accumulate.
TEST_F(TrainerCuda, AccumulatesAndPacks) {
    for (const bool packed : {false, true}) {
        const std::string a = packed ? "packed" : "windows";
        train({.name = a + "-cpu", .ex = make_cpu_exec(1), .accumulate = 3, .packed = packed});
        train({.name = a, .accumulate = 3, .packed = packed});
        EXPECT_LT(furthest(curve(a), curve(a + "-cpu")), 2e-3) << a;
    }
}

TEST_F(TrainerCuda, DeterministicRunsGiveTheSameBytes) {
    Exec ex = make_cuda_exec();
    ex.deterministic = true;
    for (const char* architecture : {"mamba", "mamba2"}) {
        std::string first;
        for (const char* name : {"-a", "-b"}) {
            const std::string bytes = weights(train({.name = architecture + std::string(name),
                                                     .architecture = architecture,
                                                     .ex = ex,
                                                     .model = {.dtype = DType::bf16}}));
            if (first.empty()) first = bytes;
            EXPECT_EQ(bytes, first) << architecture;
        }
    }
}

// What was trained here goes on there, and the other way round.
TEST_F(TrainerCuda, RunsContinueOnTheOtherDevice) {
    const auto go_on = [&](int64_t steps, const Exec& ex, bool resume) {
        return train({.name = "run", .ex = ex, .steps = steps, .resume = resume, .constant = true});
    };
    go_on(10, cuda_exec(), false);
    EXPECT_EQ(go_on(20, make_cpu_exec(1), true).step, 20);
    go_on(30, cuda_exec(), true);
    train({.name = "cpu", .ex = make_cpu_exec(1), .constant = true});
    ASSERT_EQ(curve("run").size(), 30u);
    EXPECT_LT(furthest(curve("run"), curve("cpu")), 2e-3);
    // In bf16 the masters are what is saved.
    train({.name = "half", .model = {.dtype = DType::bf16}, .constant = true});
    const auto loaded = load_model(dir_ / "half", DType::f32);
    int64_t not_rounded = 0;
    loaded->visit([&](const std::string&, Parameter& p) {
        if (p.kind != Parameter::Kind::matrix) return;
        const Tensor rounded = p.value().to(DType::bf16).to(DType::f32);
        for (int64_t i = 0; i < p.value().size(); ++i)
            not_rounded += rounded.data<float>()[i] != p.value().data<float>()[i];
    });
    EXPECT_GT(not_rounded, 1000);
}

TEST_F(TrainerCuda, NotANumberStopsTheRun) {
    const NewModel shape{.vocab = 256, .e = 32, .layers = 1, .eos = 255};
    auto model = build_model(find_architecture("mamba").new_config(shape), "config");
    model->initialise(7);
    model->visit([](const std::string& name, Parameter& p) {
        if (name.ends_with("norm_f.weight")) p.value().data<float>()[3] = NAN;
    });
    TrainedLanguageModel trained(cuda_exec(), *model);
    const TokenFile tokens =
        TokenFile::open(make_cpu_exec(1), test::write_text(dir_ / "nan.txt", test::story(3000, 1)),
                        dir_ / "cache", byte_encoder());
    TrainOptions o;
    o.out = dir_ / "nan";
    o.steps = 5;
    auto source = std::make_unique<BatchSampler>(std::vector<WeightedFile>{{tokens, 1.0}},
                                                 BatchSamplerOptions{.length = 64, .batch = 4});
    Trainer trainer(cuda_exec(), trained, std::move(source), nullptr, o, false, nullptr);
    try {
        trainer.run();
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_TRUE(std::string(error.what()).starts_with("[train] step 1: the loss is nan")) << error.what();
    }
}

}  // namespace
}  // namespace ssm
