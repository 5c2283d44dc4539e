// Training through the command: the same seed gives the same bytes, on any number of threads, also when the
// run was killed and resumed on the way.
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <random>

#include "tests/support/run_program.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

Strings with(Strings first, const Strings& more) {
    first.insert(first.end(), more.begin(), more.end());
    return first;
}

class TrainDeterminism : public testing::TestWithParam<const char*> {
protected:
    TrainDeterminism() {
        std::mt19937 random(1);
        std::string text;
        const char* words[] = {"the cat ",  "a dog ",    "sat on ",        "saw ",
                               "the mat. ", "it ran.\n", "<|endoftext|>\n"};
        for (int i = 0; i < 800; ++i) text += words[random() % 7];
        folder_.file("text.txt", text);
    }
    Strings command(const std::string& out, const char* seed = "7") const {
        return {"train",
                "--arch",
                GetParam(),
                "--d-model",
                "16",
                "--layers",
                "2",
                "--d-state",
                "4",
                "--head-dim",
                "8",
                "--data",
                folder_ / "text.txt",
                "--length",
                "24",
                "--batch",
                "3",
                "--accumulate",
                "2",
                "--steps",
                "30",
                "--lr",
                "0.01",
                "--warmup",
                "4",
                "--seed",
                seed,
                "--quiet",
                "--json",
                "--log-every",
                "1",
                "--out",
                folder_ / out};
    }
    // The trained model's files, one after another.
    std::string bytes(const std::string& out) const {
        std::string all;
        for (const char* name : {"config.json", "model.safetensors"}) all += read_file(folder_ / out / name);
        EXPECT_GT(all.size(), 10'000u);
        return all;
    }
    TempFolder folder_;
};
INSTANTIATE_TEST_SUITE_P(Models, TrainDeterminism, testing::Values("mamba", "mamba2"),
                         [](const auto& named) { return std::string(named.param); });

TEST_P(TrainDeterminism, SameSeedSameBytesOnAnyThreads) {
    const auto first = json_of(with(command("one"), {"--threads", "1"}));
    EXPECT_EQ(first["steps"], 30);
    for (const char* key : {"tokens", "loss", "tokens_per_second", "parameters", "checkpoint", "stopped"})
        EXPECT_TRUE(first.contains(key)) << key;
    EXPECT_EQ(json_of(with(command("again"), {"--threads", "1"}))["loss"], first["loss"]);
    EXPECT_EQ(json_of(with(command("two"), {"--threads", "2"}))["loss"], first["loss"]);
    EXPECT_EQ(bytes("again"), bytes("one"));
    EXPECT_EQ(bytes("two"), bytes("one"));
    // Another seed is another model.
    json_of(with(command("other", "8"), {"--threads", "1"}));
    EXPECT_NE(bytes("other"), bytes("one"));
    // It learns: uniform over 256 ids is 5.5.
    EXPECT_LT(first["loss"], 5.4);
}

TEST_P(TrainDeterminism, KilledAndResumedGivesTheSameBytes) {
    const Strings one_thread{"--threads", "1", "--checkpoint-every", "3"};
    json_of(with(command("whole"), one_thread));
    const Strings arguments = with(with(command("killed"), one_thread), {"--resume"});
    int kills = 0;
    for (useconds_t delay = 20'000;; delay += 40'000) {
        std::vector<char*> argv{const_cast<char*>(SSM_PROGRAM)};
        for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
        argv.push_back(nullptr);
        const pid_t child = fork();
        if (child == 0) {
            const int null = open("/dev/null", O_WRONLY);
            dup2(null, STDOUT_FILENO);
            dup2(null, STDERR_FILENO);
            execv(argv[0], argv.data());
            _exit(127);
        }
        usleep(delay);
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFEXITED(status)) {
            ASSERT_EQ(WEXITSTATUS(status), 0);
            break;
        }
        ASSERT_LT(++kills, 200);
    }
    EXPECT_GT(kills, 0);
    EXPECT_EQ(bytes("killed"), bytes("whole"));
}

// What was trained is a model like any other.
TEST_P(TrainDeterminism, TheModelRuns) {
    json_of(command("run"));
    const std::string dir = folder_ / "run";
    EXPECT_EQ(json_of({"inspect", dir, "--json"})["architecture"], GetParam());
    EXPECT_EQ(json_of({"generate", "--model", dir, "--ids", "116 104 101", "-n", "8", "--json"})["prompt_ids"]
                  .size(),
              3u);
    // A finished run is not started over by accident.
    EXPECT_EQ(failure_of(command("run")).rfind("ssm: [", 0), 0u);
}

}  // namespace
}  // namespace ssm::test
