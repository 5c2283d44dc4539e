// Runs that end badly, in child processes: killed at random moments, out of room. (One thread throughout:
// a child of fork has no OpenMP pool.)
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <nlohmann/json.hpp>
#include <sstream>

#include "ssm/train/bigram.h"
#include "ssm/train/sampler.h"
#include "ssm/train/test_files.h"
#include "ssm/train/trainer.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

using test::Bigram;
using test::read_file;
using test::TempFolder;
using test::write_text;
namespace fs = std::filesystem;

constexpr BatchSamplerOptions kSampler{.length = 16, .batch = 2, .seed = 3};

class InterruptionTest : public ::testing::Test {
protected:
    TokenFile tokens() {
        return TokenFile::open(exec_, write_text(dir_ / "train.txt", test::story(2000, 1)), dir_ / "cache",
                               byte_encoder());
    }
    TrainOptions options(const std::string& out) {
        TrainOptions o;
        o.out = dir_ / out;
        o.steps = 60;
        o.schedule = {.peak = 0.05, .floor = 0.005, .warmup = 5};
        o.log_every = 1;
        o.checkpoint_every = 3;
        return o;
    }
    TrainSummary train(const TrainOptions& o) {
        Bigram model(256);
        return Trainer(exec_, model, source(), nullptr, o, true, nullptr).run();
    }

    std::unique_ptr<BatchSampler> source() const {
        return std::make_unique<BatchSampler>(std::vector<WeightedFile>{{train_, 1.0}}, kSampler);
    }

    TempFolder dir_;
    Exec exec_ = make_cpu_exec(1);
    TokenFile train_ = tokens();
};

// Trains in a child that is killed after `microseconds`; true when it had finished by then.
template <class F>
bool finishes(int64_t microseconds, F&& f) {
    const pid_t child = ::fork();
    if (child == 0) {
        try {
            f();
            ::_exit(0);
        } catch (const std::exception& e) {
            std::fprintf(stderr, "%s\n", e.what());
            ::_exit(1);
        }
    }
    ::usleep(static_cast<useconds_t>(microseconds));
    ::kill(child, SIGKILL);
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(!WIFEXITED(status) || WEXITSTATUS(status) == 0);
    return WIFEXITED(status);
}

// The same checkpoint, and the same lines of metrics but for the clock.
void expect_same_run(const fs::path& actual, const fs::path& expected, int steps) {
    for (const char* file : {"model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"}) {
        if (!fs::exists(expected / "last" / file)) continue;  // the bigram has no config
        EXPECT_EQ(read_file(actual / "last" / file), read_file(expected / "last" / file)) << file;
    }
    std::istringstream a(read_file(actual / "metrics.jsonl")), b(read_file(expected / "metrics.jsonl"));
    std::string x, y;
    for (int step = 1; step <= steps; ++step) {
        ASSERT_TRUE(std::getline(a, x) && std::getline(b, y));
        const auto p = nlohmann::json::parse(x), q = nlohmann::json::parse(y);
        EXPECT_EQ(p["step"], step);
        for (const char* key : {"step", "tokens", "epoch", "loss", "learning_rate", "gradient_norm"}) {
            EXPECT_EQ(p[key], q[key]) << key << " of step " << step;
        }
    }
    EXPECT_FALSE(std::getline(a, x) || std::getline(b, y));
}

TEST_F(InterruptionTest, KilledAtAnyMomentResumesToTheSameBytes) {
    const TrainOptions whole = options("whole");
    const auto start = std::chrono::steady_clock::now();
    train(whole);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    const auto base = static_cast<int64_t>(took.count() / 15) + 100;
    test::Random random(7);
    int kills = 0, while_writing = 0;
    for (int run = 0; run < 20 && kills < 12; ++run) {
        const TrainOptions parts = options("parts" + std::to_string(run));
        std::optional<fs::path> before;
        for (int64_t limit = base; !finishes(random.integer(0, limit), [&] { train(parts); });) {
            ++kills;
            while_writing += fs::exists(parts.out / "checkpoints/.writing");
            const auto now = RunFolder::latest(parts.out);
            limit = now != before ? base : limit * 2;  // a busy machine gets more time
            before = now;
        }
        expect_same_run(parts.out, whole.out, 60);
    }
    EXPECT_GE(kills, 12);
    RecordProperty("kills", kills);
    RecordProperty("while_writing_a_checkpoint", while_writing);
    std::printf("%d kills, %d of them while a checkpoint was written\n", kills, while_writing);
}

// What a kill can leave behind, laid out by hand.
TEST_F(InterruptionTest, LeftoversAreIgnored) {
    TrainOptions whole = options("whole"), parts = options("parts");
    whole.steps = 12;
    train(whole);
    parts.steps = 12;
    {
        Bigram model(256);
        const std::atomic<bool> stop = true;
        TrainOptions o = parts;
        Trainer(exec_, model, source(), nullptr, o, true, nullptr).run(&stop);
    }
    const fs::path checkpoints = parts.out / "checkpoints";
    fs::create_directory(checkpoints / ".writing");
    write_text(checkpoints / ".writing/model.safetensors", "half");
    fs::create_directory(checkpoints / ".removing");
    write_text(checkpoints / ".removing/trainer.json", "{");
    fs::remove(parts.out / "last");
    fs::create_symlink("checkpoints/step-00000000", parts.out / "last.new");
    write_text(parts.out / "metrics.jsonl", read_file(parts.out / "metrics.jsonl") + "{\"step\": 2, \"to");
    train(parts);
    expect_same_run(parts.out, whole.out, 12);
    EXPECT_FALSE(fs::exists(checkpoints / ".writing") || fs::exists(checkpoints / ".removing"));
}

// Runs `f` in a child where no file may grow past `bytes`; its exit status is 3 when an Error (io) came.
int with_file_limit(rlim_t bytes, const std::function<void()>& f) {
    const pid_t child = ::fork();
    if (child == 0) {
        std::signal(SIGXFSZ, SIG_IGN);
        const rlimit limit{bytes, bytes};
        ::setrlimit(RLIMIT_FSIZE, &limit);
        try {
            f();
        } catch (const Error& e) {
            ::_exit(e.code() == ErrorCode::io ? 3 : 4);
        }
        ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(InterruptionTest, WithoutRoomItStopsBeforeTraining) {
    const TrainOptions o = options("full");
    EXPECT_EQ(
        with_file_limit(
            10000,
            [&] { Trainer(exec_, *std::make_unique<Bigram>(256), source(), nullptr, o, false, nullptr); }),
        3);
    EXPECT_FALSE(RunFolder::latest(o.out).has_value());
    EXPECT_EQ(train(o).step, 60) << "the folder is still good";
}

TEST_F(InterruptionTest, WhenRoomRunsOutTheLastCheckpointStays) {
    TrainOptions o = options("fills");
    o.steps = 30;
    train(o);
    const std::string good = read_file(*RunFolder::latest(o.out) / "model.safetensors");
    o.steps = 60;
    EXPECT_EQ(with_file_limit(300000, [&] { train(o); }),
              3);  // the model has 263,168 bytes, its moments more
    EXPECT_EQ(RunFolder::latest(o.out)->filename(), "step-00000030");
    EXPECT_EQ(read_file(o.out / "last/model.safetensors"), good);
    EXPECT_EQ(train(o).step, 60);
}

TEST_F(InterruptionTest, ReadOnlyFolder) {
    if (::geteuid() == 0) {
        // Root may write anywhere but in the kernel's own file systems.
        const TrainOptions o = [&] {
            auto p = options("x");
            p.out = "/proc/ssm";
            return p;
        }();
        EXPECT_EQ(test::error_of([&] { train(o); }),
                  "[train] cannot create `/proc/ssm/checkpoints`: No such file or directory");
        return;
    }
    const TrainOptions o = options("closed");
    fs::create_directory(o.out);
    fs::permissions(o.out, fs::perms::owner_read | fs::perms::owner_exec);
    EXPECT_EQ(test::error_of([&] { train(o); }),
              fmt::format("[train] cannot create `{}`: Permission denied", (o.out / "checkpoints").string()));
}

}  // namespace
}  // namespace ssm
