// The trainer with the smallest model and with a small Mamba: it learns, batches add up, resuming is exact,
// metrics have no gap and no duplicate, NaN stops it, memory stays.
#include "ssm/train/trainer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "ssm/models/registry.h"
#include "ssm/train/bigram.h"
#include "ssm/train/hash.h"
#include "ssm/train/test_files.h"
#include "ssm/train/text_validator.h"
#include "ssm/train/trained_language_model.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

using test::Bigram;
using test::error_of;
using test::read_file;
using test::TempFolder;
using test::write_text;

struct TextOptions : TrainOptions {
    BatchSamplerOptions sampler;
};

class TrainerTest : public ::testing::Test {
protected:
    TokenFile tokens(const std::string& name, int words, uint64_t seed) {
        return TokenFile::open(exec_, write_text(dir_ / name, test::story(words, seed)), dir_ / "cache",
                               byte_encoder());
    }
    TextOptions options(const std::string& out) {
        TextOptions o;
        o.out = dir_ / out;
        o.sampler = {.length = 16, .batch = 4, .seed = 3};
        o.steps = 40;
        o.schedule = {.peak = 0.05, .floor = 0.005, .warmup = 5};
        o.log_every = 4;
        o.checkpoint_every = 10;
        o.valid_every = 20;
        return o;
    }
    Trainer trainer(Trainable& model, const TextOptions& o, bool resume = false) {
        return Trainer(exec_, model,
                       std::make_unique<BatchSampler>(std::vector<WeightedFile>{{train_, 1.0}}, o.sampler),
                       std::make_unique<TextValidator>(model, std::vector<WeightedFile>{{valid_, 1.0}},
                                                       o.sampler.length, o.sampler.batch),
                       o, resume, nullptr);
    }
    std::vector<nlohmann::json> metrics(const TrainOptions& o) {
        std::vector<nlohmann::json> rows;
        std::istringstream text(read_file(o.out / "metrics.jsonl"));
        for (std::string line; std::getline(text, line);) rows.push_back(nlohmann::json::parse(line));
        return rows;
    }
    std::unique_ptr<LanguageModel> mamba(uint64_t seed = 1) {
        const NewModel shape{.vocab = 256, .e = 16, .layers = 2, .n = 4, .eos = 255};
        auto model = build_model(find_architecture("mamba").new_config(shape), "config");
        model->initialise(seed);
        return model;
    }

    TempFolder dir_;
    Exec exec_ = make_cpu_exec(1);
    TokenFile train_ = tokens("train.txt", 2000, 1), valid_ = tokens("valid.txt", 200, 2);
};

// All files of a checkpoint, in one string.
std::string bytes_of(const std::filesystem::path& checkpoint) {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(checkpoint)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    std::string all;
    for (const auto& file : files) {
        all += file.filename().string();
        all += read_file(file);
    }
    return all;
}

TEST_F(TrainerTest, LearnsAndReports) {
    Bigram model(256);
    const TextOptions o = options("a");
    Trainer t = trainer(model, o);
    EXPECT_NEAR(t.validate().loss, std::log(256.0), 1e-6) << "a table of zeros";
    const TrainSummary s = t.run();
    EXPECT_EQ(s.step, 40);
    EXPECT_EQ(s.tokens, 40 * 64);
    EXPECT_FALSE(s.stopped);
    ASSERT_TRUE(s.valid.has_value());
    EXPECT_LT(s.valid->loss, 4.0);
    EXPECT_EQ(s.valid->tokens, valid_.tokens() - 1);
    EXPECT_NEAR(s.valid->bits_per_byte.value(),
                s.valid->loss / std::log(2.0) * static_cast<double>(valid_.tokens() - 1) /
                    static_cast<double>(valid_.text_bytes()),
                1e-9);
    const auto rows = metrics(o);
    ASSERT_EQ(rows.size(), 12u);  // 4, 8, ..., 40, and the checkpoints' 10, 30
    for (size_t i = 1; i < rows.size(); ++i) EXPECT_LT(rows[i - 1]["step"], rows[i]["step"]);
    EXPECT_EQ(rows.back()["step"], 40);
    EXPECT_EQ(rows.back()["tokens"], 2560);
    EXPECT_LT(rows.back()["loss"], rows.front()["loss"].get<double>() - 1.0);
    EXPECT_NEAR(rows.back()["learning_rate"].get<double>(), 0.005, 1e-9);
    EXPECT_NEAR(rows.front()["learning_rate"].get<double>(), 0.04, 1e-9);
    EXPECT_EQ(rows.back()["valid_loss"], s.valid->loss);
    EXPECT_FALSE(rows.front().contains("valid_loss"));
    // The folder is a model folder, and only the newest two checkpoints are kept.
    EXPECT_EQ(read_file(o.out / "model.safetensors"), read_file(s.checkpoint / "model.safetensors"));
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(o.out / "checkpoints"), {}), 2);
}

TEST_F(TrainerTest, AccumulationEqualsALargerBatch) {
    for (const bool packed : {false, true}) {
        auto a = mamba(), b = mamba();
        TrainedLanguageModel one(exec_, *a), many(exec_, *b);
        const std::vector<WeightedFile> files{{train_, 1.0}};
        BatchSampler sampler(files, {.length = 16, .batch = 4, .seed = 3, .packed = packed});
        Batch whole;
        whole.cu_seqlens = {0};
        std::vector<Batch> parts(3);
        int64_t total = 0;
        for (Batch& p : parts) {
            sampler.next(p);
            whole.ids.insert(whole.ids.end(), p.ids.begin(), p.ids.end());
            whole.targets.insert(whole.targets.end(), p.targets.begin(), p.targets.end());
            for (size_t i = 1; i < p.cu_seqlens.size(); ++i)
                whole.cu_seqlens.push_back(total + p.cu_seqlens[i]);
            total += p.tokens();
        }
        const auto x = one.parameters(), y = many.parameters();
        const auto gradients = [](TrainedLanguageModel& model, std::span<const Batch> batches,
                                  const std::vector<double>& weights) {
            const Tensor loss = Tensor::zeros({1});
            model.set_batches(batches, weights);
            model.add_gradients(loss);
            return static_cast<double>(loss.item());
        };
        std::vector<double> weights;
        for (const Batch& p : parts)
            weights.push_back(static_cast<double>(p.tokens()) / static_cast<double>(total));
        const double loss = gradients(one, {&whole, 1}, {1.0}), sum = gradients(many, parts, weights);
        EXPECT_NEAR(sum, loss, 1e-6 * loss);
        for (size_t i = 0; i < x.size(); ++i) {
            const auto flat = [](const Tensor& t) {
                return std::vector<float>(t.data<float>(), t.data<float>() + t.size());
            };
            EXPECT_GT(test::relative_l2(flat(x[i].grad), std::vector<float>(x[i].grad.size(), 0.0f)), 0.0);
            test::expect_close(flat(y[i].grad), test::to_double(flat(x[i].grad)), 2e-5, x[i].name.c_str());
        }
    }
}

TEST_F(TrainerTest, AStepOfSmallBatchesIsAStepOfOneLargeBatch) {
    std::vector<nlohmann::json> rows[2];
    for (const int64_t accumulate : {1, 4}) {
        Bigram model(256);
        TextOptions o = options("accumulate" + std::to_string(accumulate));
        o.sampler.batch = 8 / accumulate;
        o.accumulate = accumulate;
        o.steps = 10;
        o.log_every = 1;
        trainer(model, o).run();
        rows[accumulate == 4] = metrics(o);
    }
    ASSERT_EQ(rows[0].size(), 10u);
    ASSERT_EQ(rows[1].size(), 10u);
    for (size_t i = 0; i < 10; ++i) {
        EXPECT_EQ(rows[0][i]["tokens"], rows[1][i]["tokens"]);
        for (const char* key : {"loss", "gradient_norm"}) {
            const double x = rows[0][i][key];
            EXPECT_NEAR(rows[1][i][key].get<double>(), x, 1e-4 * x) << key << " of step " << i + 1;
        }
    }
}

// Batches whose targets count here and there: 64 tokens a step, as one batch or as four.
class Sparse final : public BatchSource {
public:
    explicit Sparse(int64_t batches) : batches_(batches) {}
    void next(Batch& batch) override {
        const uint64_t length = 64 / static_cast<uint64_t>(batches_);
        batch = {.ids = {}, .targets = {}, .cu_seqlens = {0, static_cast<int64_t>(length)}};
        for (uint64_t i = 0; i < length; ++i, ++position_) {
            const uint64_t x = mix64(position_);
            const bool counts = position_ % 64 < 48 ? x % 3 == 0 : x % 16 == 0;
            batch.ids.push_back(static_cast<int32_t>(x >> 32 & 255));
            batch.targets.push_back(counts ? static_cast<int32_t>(x >> 40 & 255) : -1);
        }
    }
    SamplerState state() const override { return {0, position_}; }
    void seek(SamplerState state) override { position_ = state.position; }
    uint64_t epoch_size() const override { return uint64_t{1} << 63; }
    int64_t tokens_per_batch() const override { return 64 / batches_; }
    std::map<std::string, std::string> identity() const override { return {}; }

private:
    int64_t batches_;
    uint64_t position_ = 0;
};

TEST_F(TrainerTest, BatchesWeighByTheirTargetsThatCount) {
    std::vector<nlohmann::json> rows[2];
    for (const int64_t accumulate : {1, 4}) {
        Bigram bigram(256);
        TrainOptions o = options("counted" + std::to_string(accumulate));
        o.accumulate = accumulate;
        o.steps = 10;
        o.log_every = 1;
        Trainer(exec_, bigram, std::make_unique<Sparse>(accumulate), nullptr, o, false, nullptr).run();
        rows[accumulate == 4] = metrics(o);
    }
    ASSERT_EQ(rows[0].size(), 10u);
    ASSERT_EQ(rows[1].size(), 10u);
    for (size_t i = 0; i < 10; ++i) {
        for (const char* key : {"tokens", "loss", "gradient_norm"}) {
            const double x = rows[0][i][key];
            EXPECT_NEAR(rows[1][i][key].get<double>(), x, 1e-4 * x) << key << " of step " << i + 1;
        }
    }
}

TEST_F(TrainerTest, GradientsAreClippedByTheGlobalNorm) {
    // AdamW does not see a constant factor, so look at its first moment: (1 - beta1) g after one step.
    for (const double clip : {0.0, 0.01}) {
        Bigram model(256);
        TextOptions o = options(clip > 0 ? "clipped" : "free");
        o.steps = 1;
        o.optimizer.clip = clip;
        Trainer t = trainer(model, o);
        const TrainSummary s = t.run();
        const SafetensorsFile state = SafetensorsFile::open(s.checkpoint / "optimizer.safetensors");
        double sum = 0;
        for (const char* name : {"m.table.weight", "m.bias"}) {
            const Tensor m = state.tensor(name);
            for (int64_t i = 0; i < m.size(); ++i) sum += std::pow(m.data<const float>()[i], 2.0);
        }
        const double norm = metrics(o).back()["gradient_norm"];
        EXPECT_GT(norm, 0.05);
        EXPECT_NEAR(std::sqrt(sum), 0.1 * (clip > 0 ? clip : norm), 1e-6);
    }
}

TEST_F(TrainerTest, WeightDecaySparesVectors) {
    auto model = mamba();
    TrainedLanguageModel trained(exec_, *model);
    for (const TrainedParameter& p : trained.parameters()) {
        const auto ends = [&](const char* s) { return p.name.ends_with(s); };
        const bool vector =
            ends(".bias") || ends("norm.weight") || ends("norm_f.weight") || ends(".A_log") || ends(".D");
        EXPECT_EQ(p.weight_decay, !vector) << p.name;
    }
}

TEST_F(TrainerTest, ResumedEqualsUninterrupted) {
    for (const bool packed : {false, true}) {
        const auto at = [&](const char* name) {
            TextOptions o = options(std::string(name) + (packed ? "-packed" : ""));
            o.sampler.packed = packed;
            o.accumulate = 2;
            o.steps = 12;
            o.checkpoint_every = 5;
            o.files = {{"tokenizer.json", byte_encoder().tokenizer_json}};
            return o;
        };
        auto model = mamba();
        TrainedLanguageModel whole(exec_, *model);
        const TrainSummary expected = trainer(whole, at("whole")).run();

        // Stopped after every step, each time in a new model with other values.
        TrainSummary s;
        for (int round = 0; round < 12; ++round) {
            auto fresh = mamba(round == 0 ? 1 : 77);
            TrainedLanguageModel part(exec_, *fresh);
            Trainer t = trainer(part, at("parts"), true);
            EXPECT_EQ(t.step(), round);
            const std::atomic<bool> stop = true;
            s = t.run(&stop);
            EXPECT_EQ(s.stopped, round < 11);
        }
        EXPECT_EQ(s.step, 12);
        EXPECT_EQ(bytes_of(s.checkpoint), bytes_of(expected.checkpoint));
        auto fresh = mamba(5);
        TrainedLanguageModel again(exec_, *fresh);
        const TrainSummary done = trainer(again, at("parts"), true).run();
        EXPECT_EQ(done.step, 12) << "resuming a finished run does nothing";
        EXPECT_NEAR(done.loss, s.loss, 1e-12);
    }
}

TEST_F(TrainerTest, MetricsAreCutToTheCheckpoint) {
    TextOptions o = options("cut");
    {
        Bigram model(256);
        o.checkpoint_every = 0;
        trainer(model, o).run();
        std::filesystem::remove_all(o.out / "checkpoints" / "step-00000040");  // as if killed before it
    }
    ASSERT_TRUE(std::filesystem::exists(o.out / "checkpoints" / "step-00000000"));
    const auto before = metrics(o);
    write_text(o.out / "metrics.jsonl", read_file(o.out / "metrics.jsonl") + "{\"step\": 41, \"tok");
    Bigram model(256);
    trainer(model, o, true).run();
    const auto after = metrics(o);
    ASSERT_EQ(after.size(), before.size());
    for (size_t i = 0; i < after.size(); ++i) {
        EXPECT_EQ(after[i]["step"], before[i]["step"]);
        EXPECT_EQ(after[i]["loss"], before[i]["loss"]);
    }
}

TEST_F(TrainerTest, NotANumberStopsAndNamesTheParameter) {
    Bigram model(256);
    int calls = 0;
    model.after = [&](Bigram& b) {
        if (++calls == 13) b.parameters()[1].grad.data<float>()[7] = std::numeric_limits<float>::quiet_NaN();
    };
    const TextOptions o = options("nan");
    Trainer t = trainer(model, o);
    const std::string message = error_of([&] { t.run(); });
    EXPECT_TRUE(message.starts_with("[train] step 13: the loss is ")) << message;
    EXPECT_NE(message.find("the gradient of `bias` is not finite; the last good checkpoint is `"),
              std::string::npos)
        << message;
    EXPECT_NE(message.find("step-00000010`"), std::string::npos) << message;
    EXPECT_EQ(RunFolder::latest(o.out)->filename(), "step-00000010");
}

TEST_F(TrainerTest, Errors) {
    const auto error = [&](auto change, bool resume = false) {
        Bigram model(256);
        TextOptions o = options("errors");
        change(o);
        return error_of([&] { trainer(model, o, resume); });
    };
    EXPECT_EQ(error([](TextOptions& o) { o.steps = 0; }),
              "[train] a run needs an end: steps, tokens or minutes");
    EXPECT_EQ(error([](TextOptions& o) { o.keep = 0; }), "[train] keep must be at least 1 but is 0");
    EXPECT_EQ(error([](TextOptions& o) { o.schedule.peak = NAN; }),
              "[train] the learning rate must be positive but is nan");
    EXPECT_EQ(error([](TextOptions& o) { o.schedule.floor = 1; }),
              "[train] the lowest learning rate 1 is not in [0, 0.05]");
    EXPECT_EQ(error([](TextOptions&) {}), "(no error)");
    const std::string out = (dir_ / "errors").string();
    EXPECT_EQ(
        error([](TextOptions&) {}),
        fmt::format(
            "[train] `{}` has a run already (step 0); continue it with --resume or choose another folder",
            out));
    EXPECT_EQ(error([](TextOptions& o) { o.sampler.length = 8; }, true),
              fmt::format("[train] cannot resume `{}`: `length` was 16 but is 8 now", out));
    EXPECT_EQ(error([](TextOptions& o) { o.identity["data"] = "x"; }, true),
              fmt::format("[train] cannot resume `{}`: `data` was absent but is x now", out));
    write_text(dir_ / "errors/checkpoints/step-00000000/trainer.json", "{}");
    EXPECT_EQ(
        error([](TextOptions&) {}, true),
        fmt::format("[train] `{}/checkpoints/step-00000000/trainer.json` is not a trainer's state", out));
    Bigram model(256), other(256);
    const TextOptions o = options("locked");
    Trainer first = trainer(model, o);
    EXPECT_EQ(error_of([&] { trainer(other, o, true); }),
              fmt::format("[train] `{}` is in use by another run", o.out.string()));
    write_text(dir_ / "file", "");
    EXPECT_EQ(
        error([&](TextOptions& p) { p.out = dir_ / "file/out"; }),
        fmt::format("[train] cannot create `{}`: Not a directory", (dir_ / "file/out/checkpoints").string()));
}

TEST_F(TrainerTest, MambaLearnsAndValidatesWithItsNewWeights) {
    auto model = mamba();
    TrainedLanguageModel trained(exec_, *model);
    TextOptions o = options("mamba");
    o.steps = 60;
    o.schedule = {.peak = 0.01, .floor = 0.001, .warmup = 5};
    Trainer t = trainer(trained, o);
    const double before = t.validate().loss;
    const TrainSummary s = t.run();
    EXPECT_NEAR(before, std::log(256.0), 0.5);
    EXPECT_LT(s.valid->loss, before - 2.0);
    // A packed weight left over from the first validation would show here.
    auto loaded = load_model(o.out, DType::f32);
    TrainedLanguageModel again(exec_, *loaded);
    TextOptions p = options("again");
    EXPECT_DOUBLE_EQ(trainer(again, p).validate().loss, s.valid->loss);
}

TEST_F(TrainerTest, ThreadsDoNotChangeTheResult) {
    std::string first;
    for (const int threads : {1, 2, 3}) {
        exec_ = make_cpu_exec(threads);
        auto model = mamba();
        TrainedLanguageModel trained(exec_, *model);
        TextOptions o = options("threads" + std::to_string(threads));
        o.steps = 5;
        const TrainSummary s = trainer(trained, o).run();
        const std::string bytes = read_file(s.checkpoint / "model.safetensors");
        if (first.empty()) first = bytes;
        EXPECT_EQ(bytes, first) << threads;
    }
}

TEST_F(TrainerTest, MemoryDoesNotGrow) {
    auto model = mamba();
    TrainedLanguageModel trained(exec_, *model);
    TextOptions o = options("memory");
    o.steps = 6;
    trainer(trained, o).run();
    const size_t in_use = exec_.allocator->bytes_in_use(), peak = exec_.allocator->peak_bytes();
    auto second = mamba();
    TrainedLanguageModel longer(exec_, *second);
    o = options("memory2");
    o.steps = 60;
    const size_t gradients = in_use;  // of the first model, still alive
    trainer(longer, o).run();
    EXPECT_EQ(exec_.allocator->bytes_in_use(), in_use + gradients);
    EXPECT_LE(exec_.allocator->peak_bytes(), peak + gradients);
}

}  // namespace
}  // namespace ssm
