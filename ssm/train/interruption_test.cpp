// Runs that end badly, in child processes: killed at random moments, out of room. (One thread throughout:
// a child of fork has no OpenMP pool.)
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <nlohmann/json.hpp>
#include <sstream>

#include "ssm/train/bigram.h"
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

class InterruptionTest : public ::testing::Test {
protected:
    TokenFile tokens() {
        return TokenFile::open(exec_, write_text(dir_ / "train.txt", test::story(2000, 1)), dir_ / "cache",
                               byte_encoder());
    }
    TrainOptions options(const std::string& out) {
        TrainOptions o;
        o.out = dir_ / out;
        o.sampler = {.length = 16, .batch = 2, .seed = 3};
        o.steps = 120;
        o.schedule = {.peak = 0.05, .floor = 0.005, .warmup = 5};
        o.log_every = 1;
        o.checkpoint_every = 3;
        return o;
    }
    TrainSummary train(const TrainOptions& o) {
        Bigram model(256);
        return Trainer(exec_, model, {{train_, 1.0}}, {}, o, true, nullptr).run();
    }

    TempFolder dir_;
    Exec exec_ = make_cpu_exec(1);
    TokenFile train_ = tokens();
};

TEST_F(InterruptionTest, KilledAtAnyMomentResumesToTheSameBytes) {
    const TrainOptions whole = options("whole"), parts = options("parts");
    const TrainSummary expected = train(whole);
    test::Random random(7);
    int kills = 0, inside_a_checkpoint = 0;
    for (int attempt = 0; attempt < 1000; ++attempt) {
        const pid_t child = ::fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            try {
                train(parts);
                ::_exit(0);
            } catch (const std::exception& e) {
                std::fprintf(stderr, "%s\n", e.what());
                ::_exit(1);
            }
        }
        ::usleep(static_cast<useconds_t>(random.integer(2000, 80000)));
        ::kill(child, SIGKILL);
        int status = 0;
        ASSERT_EQ(::waitpid(child, &status, 0), child);
        if (WIFEXITED(status)) {
            ASSERT_EQ(WEXITSTATUS(status), 0);
            break;
        }
        ++kills;
        inside_a_checkpoint += fs::exists(parts.out / "checkpoints/.writing");
    }
    EXPECT_GE(kills, 5);
    EXPECT_GE(inside_a_checkpoint, 1) << "no kill came while a checkpoint was written";
    const fs::path last = *RunFolder::latest(parts.out);
    ASSERT_EQ(last.filename(), expected.checkpoint.filename());
    for (const char* file : {"model.safetensors", "optimizer.safetensors", "trainer.json"}) {
        EXPECT_EQ(read_file(last / file), read_file(expected.checkpoint / file)) << file;
    }
    // The same lines, but for the clock.
    std::istringstream a(read_file(whole.out / "metrics.jsonl")), b(read_file(parts.out / "metrics.jsonl"));
    std::string x, y;
    for (int step = 1; step <= 120; ++step) {
        ASSERT_TRUE(std::getline(a, x) && std::getline(b, y));
        const auto p = nlohmann::json::parse(x), q = nlohmann::json::parse(y);
        EXPECT_EQ(p["step"], step);
        for (const char* key : {"step", "tokens", "epoch", "loss", "learning_rate", "gradient_norm"}) {
            EXPECT_EQ(p[key], q[key]) << key << " of step " << step;
        }
    }
    EXPECT_FALSE(std::getline(a, x) || std::getline(b, y));
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
    EXPECT_EQ(with_file_limit(
                  10000,
                  [&] {
                      Trainer(exec_, *std::make_unique<Bigram>(256), {{train_, 1.0}}, {}, o, false, nullptr);
                  }),
              3);
    EXPECT_FALSE(RunFolder::latest(o.out).has_value());
    EXPECT_EQ(train(o).step, 120) << "the folder is still good";
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
