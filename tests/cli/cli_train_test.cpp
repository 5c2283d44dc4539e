// `ssm train` as its users see it: from a text to a model that generates; stopped and resumed; its
// complaints.
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <fstream>

#include "tests/support/run_program.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

class CliTrain : public testing::Test {
protected:
    CliTrain() {
        std::string text;
        for (int i = 0; i < 200; ++i) text += "the cat sat on the mat.\n<|endoftext|>\n";
        data_ = dir_.file("data.txt", text);
        valid_ = dir_.file("valid.txt", "the cat sat on the mat.\n");
    }
    Strings arguments(const std::string& out, const Strings& more = {}) const {
        Strings all{"train",   "--out",    dir_ / out,  "--arch",   "mamba",   "--data", data_,
                    "--valid", valid_,     "--length",  "16",       "--batch", "2",      "--d-model",
                    "16",      "--layers", "1",         "--warmup", "5",       "--lr",   "0.02",
                    "--steps", "60",       "--threads", "1",        "--quiet"};
        for (size_t i = 0; i < more.size(); ++i) {  // replaces or adds
            const auto old = std::find(all.begin(), all.end(), more[i]);
            if (old != all.end() && i + 1 < more.size()) {
                *(old + 1) = more[++i];
            } else {
                all.push_back(more[i]);
            }
        }
        return all;
    }
    // The complaint, with the test's folder called DIR.
    std::string complaint(const Strings& all, int exit_code = 1) const {
        std::string text = failure_of(all, "", exit_code);
        for (size_t at; (at = text.find(dir_.path().string())) != std::string::npos;) {
            text = text.substr(0, at) + "DIR" + text.substr(at + dir_.path().string().size());
        }
        return text;
    }
    TempFolder dir_;
    std::string data_, valid_;
};

TEST_F(CliTrain, FromTextToAModelThatGenerates) {
    const auto result = json_of(arguments("run", {"--json"}));
    EXPECT_EQ(result["steps"], 60);
    EXPECT_EQ(result["tokens"], 60 * 32);
    EXPECT_EQ(result["stopped"], false);
    EXPECT_LT(result["valid_loss"].get<double>(), 2.5);  // 5.5 at first: 256 bytes
    EXPECT_GT(result["bits_per_byte"].get<double>(), result["valid_loss"].get<double>());
    const auto text = json_of({"generate", "--model", dir_ / "run", "--prompt", "the ", "-n", "8", "--greedy",
                               "--threads", "1", "--json"});
    EXPECT_EQ(text["prompt_ids"], (std::vector<int>{'t', 'h', 'e', ' '}));
    EXPECT_EQ(text["ids"].size(), 8u);
    const auto eval =
        json_of({"eval", "--model", dir_ / "run", "--text", valid_, "--json", "--threads", "1"});
    EXPECT_GT(eval["tokens"], 20);
    // Everything is said by the folder; nothing is left to do.
    const auto again = json_of({"train", "--out", dir_ / "run", "--resume", "--quiet", "--json"});
    EXPECT_EQ(again["steps"], 60);
    const auto longer =
        json_of({"train", "--out", dir_ / "run", "--resume", "--steps", "62", "--quiet", "--json"});
    EXPECT_EQ(longer["steps"], 62);
}

TEST_F(CliTrain, WithAVocabularyOfItsOwn) {
    const std::string vocabulary = dir_ / "vocabulary.json";
    json_of({"tokenizer", "train", "--data", data_, "--vocab-size", "280", "--out", vocabulary, "--json"});
    const auto result = json_of(arguments("run", {"--json", "--tokenizer", vocabulary, "--length", "4"}));
    EXPECT_EQ(read_file(dir_ / "run" / "tokenizer.json"), read_file(vocabulary));
    const std::string text = "the cat sat on the mat.\n";
    const auto ids =
        json_of({"tokenizer", "encode", "--tokenizer", vocabulary, "--text", text, "--json"})["ids"];
    ASSERT_LT(ids.size(), text.size() / 2);  // whole words: other ids than bytes
    // It writes the words that it was trained on; a token is more than 1.44 bytes, so bits per byte are
    // fewer.
    const auto out = json_of({"generate", "--model", dir_ / "run", "--prompt", "the cat", "-n", "3",
                              "--greedy", "--threads", "1", "--json"});
    EXPECT_EQ(out["text"].get<std::string>().substr(0, 11), " sat on the") << out.dump();
    EXPECT_LT(result["bits_per_byte"].get<double>(), result["valid_loss"].get<double>());
}

TEST_F(CliTrain, ARecipeSaysTheSameAsFlags) {
    json_of(arguments("flags", {"--json", "--packed"}));
    const nlohmann::json recipe = {
        {"comment", "a test"}, {"arch", "mamba"}, {"data", {data_}}, {"valid", valid_}, {"length", 16},
        {"batch", 2},          {"d-model", 16},   {"layers", 1},     {"warmup", 5},     {"lr", 0.02},
        {"steps", 1000000},    {"threads", 1},    {"packed", true}};
    const std::string file = dir_.file("recipe.json", recipe.dump());
    json_of({"train", "--recipe", file, "--out", dir_ / "recipe", "--steps", "60", "--quiet", "--json"});
    EXPECT_EQ(read_file(dir_ / "recipe" / "last/model.safetensors"),
              read_file(dir_ / "flags" / "last/model.safetensors"));
}

// Starts a run and sends it `signal` after its first line of metrics; its exit status.
int stop_with(int signal, Strings all, const fs::path& metrics) {
    all.insert(all.begin(), SSM_PROGRAM);
    std::vector<char*> argv;
    for (std::string& a : all) argv.push_back(a.data());
    argv.push_back(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        alarm(120);
        if (std::freopen("/dev/null", "w", stdout) == nullptr) _exit(126);
        execv(argv[0], argv.data());
        _exit(127);
    }
    std::error_code ignored;
    int status = 0;
    while (!(fs::exists(metrics, ignored) && fs::file_size(metrics, ignored) > 0)) {
        if (waitpid(child, &status, WNOHANG) == child) return status;
        usleep(500);
    }
    kill(child, signal);
    waitpid(child, &status, 0);
    return status;
}

TEST_F(CliTrain, ASignalStopsItAndResumingGivesTheSameBytes) {
    const Strings often{"--steps", "400", "--log-every", "1", "--checkpoint-every", "100"};
    ASSERT_EQ(run_ssm(arguments("whole", often)).exit_code, 0);
    for (const int signal : {SIGINT, SIGTERM}) {
        const std::string out = "signal" + std::to_string(signal);
        const int status = stop_with(signal, arguments(out, often), dir_ / out / "metrics.jsonl");
        EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
        const std::string last = fs::read_symlink(dir_ / out / "last").filename();
        EXPECT_NE(last, "step-00000000") << "no checkpoint was written";
        const auto done = json_of({"train", "--out", dir_ / out, "--resume", "--quiet", "--json"});
        EXPECT_EQ(done["steps"], 400);
        for (const char* file : {"model.safetensors", "optimizer.safetensors", "trainer.json"}) {
            EXPECT_EQ(read_file(dir_ / out / "last" / file), read_file(dir_ / "whole" / "last" / file))
                << file;
        }
    }
}

TEST_F(CliTrain, Errors) {
    EXPECT_EQ(complaint({"train", "--data", data_}), "ssm: [train] give the folder of the run: --out DIR");
    EXPECT_EQ(complaint({"train", "--out", dir_ / "a", "--data", data_}),
              "ssm: [train] give one of --arch, --config and --init-from");
    EXPECT_EQ(complaint({"train", "--out", dir_ / "a", "--arch", "mamba"}),
              "ssm: [train] no text to train on: give --data FILE");
    EXPECT_EQ(complaint({"train", "--out", dir_ / "a", "--arch", "mamba", "--data", data_}),
              "ssm: [train] a run needs an end: steps, tokens or minutes");
    EXPECT_EQ(complaint(arguments("a", {"--data", dir_ / "none.txt"})),
              "ssm: [corpus] cannot read `DIR/none.txt`: No such file or directory");
    EXPECT_EQ(complaint(arguments("a", {"--length", "100000"})),
              "ssm: [sampler] a file has 4801 tokens, fewer than one window of 100000");
    EXPECT_EQ(complaint(arguments("a", {"--batch", "999999999999"})),
              "ssm: [sampler] a batch of 999999999999 x 16 tokens is more than 2147483647");
    EXPECT_EQ(complaint(arguments("a", {"--lr", "nan"})),
              "ssm: [train] the learning rate must be positive but is nan");
    EXPECT_EQ(complaint(arguments("data.txt")),
              "ssm: [corpus] cannot create the cache folder `DIR/data.txt/cache`: Not a directory");
    EXPECT_EQ(complaint(arguments("a", {"--lr", "1e30", "--clip", "0", "--warmup", "0"})).substr(0, 33),
              "ssm: [train] step 2: the loss is ");
    EXPECT_EQ(complaint(arguments("a")),
              "ssm: [train] `DIR/a` has a run already (step 0); continue it with --resume or choose another "
              "folder");
    EXPECT_EQ(complaint(arguments("a", {"--resume", "--d-model", "8"}))
                  .rfind("ssm: [train] cannot resume `DIR/a`: `config` was", 0),
              0u);
    // Without a value it means layers, not that it was not given.
    for (const Strings& recompute : {Strings{"--recompute"}, Strings{"--recompute", "layers"}})
        EXPECT_EQ(complaint(arguments("b", recompute)), "ssm: [train] --recompute is for --device cuda");
    EXPECT_EQ(complaint(arguments("b", {"--recompute", "most"}), 2)
                  .rfind("ssm: [usage] --recompute: most not in ", 0),
              0u);
    const auto recipe = [&](const std::string& content) {
        return complaint({"train", "--out", dir_ / "b", "--recipe", dir_.file("r.json", content)});
    };
    EXPECT_EQ(recipe("[1]"), "ssm: [recipe] `DIR/r.json` is not a JSON object");
    EXPECT_EQ(recipe(R"({"lenght": 3})"),
              "ssm: [recipe] `DIR/r.json`: \"lenght\" is not an option of a recipe");
    EXPECT_EQ(recipe(R"({"out": "x", "resume": true})"),
              "ssm: [recipe] `DIR/r.json`: \"resume\" is not an option of a recipe");
    EXPECT_EQ(recipe(R"({"length": "long"})"),
              "ssm: [recipe] `DIR/r.json`: \"length\": --length: must be greater than 0 but is long");
    EXPECT_EQ(recipe(R"({"length": -1})").substr(0, 38), "ssm: [recipe] `DIR/r.json`: \"length\": ");
    EXPECT_EQ(recipe(R"({"lr": null})"), "ssm: [recipe] `DIR/r.json`: \"lr\" has no value: null");
}

}  // namespace
}  // namespace ssm::test
