// `ssm task` as its users see it: trains, tests by length, tests again from the folder, resumes; its
// complaints.
#include <gtest/gtest.h>

#include "tests/support/run_program.h"

namespace ssm::test {
namespace {

using Strings = std::vector<std::string>;

class CliTask : public testing::Test {
protected:
    Strings arguments(const std::string& out, const Strings& more = {}) const {
        Strings all{
            "task", "induction-heads", "--out",   dir_ / out, "--length",  "12",     "--d-model",
            "16",   "--batch",         "4",       "--steps",  "20",        "--seed", "3",
            "--lr", "0.003",           "--quiet", "--json",   "--threads", "1",      "--valid-sequences",
            "16"};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
    TempFolder dir_;
};

TEST_F(CliTask, TrainsAndTestsEveryLength) {
    const auto result = json_of(arguments("run", {"--eval-lengths", "12,40", "--eval-sequences", "50"}));
    EXPECT_EQ(result["steps"], 20);
    EXPECT_EQ(result["tokens"], 20 * 4 * 12);
    EXPECT_EQ(result["stopped"], false);
    EXPECT_GE(result["valid_accuracy"], 0.0);
    ASSERT_EQ(result["lengths"].size(), 2u);
    EXPECT_EQ(result["lengths"][1]["length"], 40);
    EXPECT_EQ(result["lengths"][1]["sequences"], 50);
    EXPECT_EQ(result["lengths"][1]["answers"], 50);
    const auto file = nlohmann::json::parse(read_file(dir_ / "run/accuracy.json"));
    EXPECT_EQ(file["task"], "induction-heads");
    EXPECT_EQ(file["lengths"], result["lengths"]);

    // The same answers from the folder; a budget of tokens bounds the sequences.
    auto again = json_of({"task", "induction-heads", "--eval", dir_ / "run", "--eval-lengths", "12", "40",
                          "1000", "--eval-sequences", "50", "--eval-tokens", "2500", "--seed", "3", "--json",
                          "--quiet", "--threads", "1"});
    EXPECT_EQ(again["lengths"][0]["accuracy"], result["lengths"][0]["accuracy"]);
    EXPECT_EQ(again["lengths"][1]["accuracy"], result["lengths"][1]["accuracy"]);
    EXPECT_EQ(again["lengths"][2]["sequences"], 2);
    const ProgramResult table = run_ssm({"task", "induction-heads", "--eval", dir_ / "run", "--eval-lengths",
                                         "12", "--eval-sequences", "7", "--quiet", "--threads", "1"});
    EXPECT_EQ(table.exit_code, 0);
    EXPECT_NE(table.out.find("  length  sequences   answers   accuracy"), std::string::npos) << table.out;
    EXPECT_EQ(json_of({"inspect", dir_ / "run", "--json"})["architecture"], "mamba");
}

TEST_F(CliTask, ResumesWithItsOptions) {
    const Strings no_test{"--eval-lengths", "12", "--eval-sequences", "1"};
    json_of(arguments("whole", no_test));
    Strings half = arguments("parts", no_test);
    half[11] = "8";
    ASSERT_EQ(half[10], "--steps");
    EXPECT_EQ(json_of(half)["steps"], 8);
    const auto rest = json_of({"task", "induction-heads", "--out", dir_ / "parts", "--resume", "--steps",
                               "20", "--json", "--quiet"});
    EXPECT_EQ(rest["steps"], 20);
    for (const char* file : {"model.safetensors", "optimizer.safetensors", "trainer.json"})
        EXPECT_EQ(read_file(dir_ / "parts/last" / file), read_file(dir_ / "whole/last" / file)) << file;
}

TEST_F(CliTask, OtherTasksAndArchitectures) {
    const auto result = json_of({"task",
                                 "selective-copying",
                                 "--out",
                                 dir_ / "copies",
                                 "--arch",
                                 "mamba2",
                                 "--head-dim",
                                 "8",
                                 "--d-model",
                                 "16",
                                 "--length",
                                 "40",
                                 "--batch",
                                 "2",
                                 "--steps",
                                 "3",
                                 "--eval-lengths",
                                 "40",
                                 "--eval-sequences",
                                 "5",
                                 "--valid-sequences",
                                 "2",
                                 "--json",
                                 "--quiet",
                                 "--threads",
                                 "1"});
    EXPECT_EQ(result["lengths"][0]["answers"], 5 * 16);
    EXPECT_EQ(json_of({"inspect", dir_ / "copies", "--json"})["architecture"], "mamba2");
}

TEST_F(CliTask, Errors) {
    EXPECT_EQ(failure_of({"task", "parity", "--out", dir_ / "x"}),
              "ssm: [task] unknown task 'parity'; known: induction-heads, selective-copying");
    const std::string either = "ssm: [task] give either --out DIR to train in or --eval DIR, a trained model";
    EXPECT_EQ(failure_of({"task", "induction-heads"}), either);
    EXPECT_EQ(failure_of({"task", "induction-heads", "--out", "a", "--eval", "b"}), either);
    EXPECT_EQ(failure_of({"task", "induction-heads", "--out", dir_ / "x", "--length", "2"}),
              "ssm: [task] 'induction-heads' needs a length of at least 3 but it is 2");
    // Before it trains, not after.
    EXPECT_EQ(failure_of({"task", "selective-copying", "--out", dir_ / "x", "--eval-lengths", "64,31"}),
              "ssm: [task] 'selective-copying' needs a length of at least 32 but it is 31");
    EXPECT_EQ(failure_of({"task", "induction-heads", "--eval", "/nowhere"}),
              "ssm: [file] /nowhere/config.json: does not exist");
    EXPECT_EQ(failure_of({"task"}, "", 2).rfind("ssm: [usage] ", 0), 0u);
    EXPECT_EQ(failure_of({"task", "induction-heads", "--steps", "0"}, "", 2).rfind("ssm: [usage] ", 0), 0u);
    EXPECT_FALSE(std::filesystem::exists(dir_ / "x/checkpoints"));

    json_of(arguments("run", {"--eval-lengths", "12", "--eval-sequences", "1"}));
    EXPECT_EQ(failure_of(arguments("run")).rfind("ssm: [train] `", 0), 0u);  // a run is there already
    const std::string other = failure_of({"task", "selective-copying", "--out", dir_ / "run", "--resume",
                                          "--length", "64", "--eval-lengths", "64", "--quiet"});
    EXPECT_EQ(other.rfind("ssm: [train] cannot resume `", 0), 0u) << other;
}

}  // namespace
}  // namespace ssm::test
