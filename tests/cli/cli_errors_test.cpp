// Bad input to the command: one line "ssm: [where] what" on stderr, exit code 1; wrong usage: 2.
#include <gtest/gtest.h>

#include <sys/stat.h>
#include <sys/wait.h>

#include "ssm/core/device.h"
#include "tests/support/byte_model.h"
#include "tests/support/run_program.h"
#include "tests/support/shared.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

// Every command that `ssm --help` lists.
Strings commands() {
    const std::string help = run_ssm({"--help"}).out;
    std::istringstream lines(help.substr(help.find("Subcommands:")));
    Strings names;
    std::string line;
    std::getline(lines, line);
    while (std::getline(lines, line)) {
        if (line.starts_with("  ") && line.size() > 2 && line[2] != ' ')
            names.push_back(line.substr(2, line.find(' ', 2) - 2));
    }
    return names;
}

TEST(CliUsage, HelpOfEveryCommand) {
    const Strings names = commands();
    for (const char* name : {"generate", "eval", "verify", "inspect", "convert", "bench", "doctor"})
        EXPECT_TRUE(std::ranges::count(names, name) == 1) << name;
    for (const std::string& name : names) {
        const ProgramResult r = run_ssm({name, "--help"});
        EXPECT_EQ(r.exit_code, 0) << name;
        EXPECT_NE(r.out.find("Usage:"), std::string::npos) << name;
        EXPECT_EQ(r.err, "") << name;
    }
    const ProgramResult version = run_ssm({"--version"});
    EXPECT_EQ(version.exit_code, 0);
    EXPECT_NE(version.out.find_first_of("0123456789"), std::string::npos);
}

TEST(CliUsage, WrongUsageIsTwo) {
    for (const Strings& arguments :
         {Strings{}, Strings{"no-such-command"}, Strings{"generate", "--no-such-option"}, Strings{"verify"},
          Strings{"generate", "--dtype", "f64"}, Strings{"generate", "--device", "tpu"},
          Strings{"generate", "--threads", "-1"}, Strings{"generate", "-n", "-3"},
          Strings{"generate", "-n", "x"}, Strings{"generate", "--prompt", "a", "--ids", "1"},
          Strings{"eval", "--window", "0"}, Strings{"eval", "--ids-type", "int8"},
          Strings{"bench", "--shape", "gpt-5"}, Strings{"convert", "x", "--out", "y", "--layout", "onnx"},
          Strings{"generate", "--temperature"}}) {
        SCOPED_TRACE(testing::PrintToString(arguments));
        EXPECT_EQ(failure_of(arguments, "", 2).rfind("ssm: [usage] ", 0), 0u);
    }
}

TEST(CliUsage, NumbersSayWhatIsAskedFor) {
    const auto complaint = [](const Strings& arguments) { return failure_of(arguments, "", 2); };
    const std::string more = "; --help says more";
    EXPECT_EQ(complaint({"eval", "--window", "0"}),
              "ssm: [usage] --window: must be greater than 0 but is 0" + more);
    EXPECT_EQ(complaint({"bench", "--pp", "-1"}), "ssm: [usage] --pp: must be 0 or greater but is -1" + more);
    EXPECT_EQ(complaint({"train", "--beta2", "1"}),
              "ssm: [usage] --beta2: must be in [0, 1) but is 1" + more);
    EXPECT_EQ(complaint({"train", "--minutes", "nan"}),
              "ssm: [usage] --minutes: must be 0 or greater but is nan" + more);
    EXPECT_EQ(complaint({"task", "induction-heads", "--dt-min", "nan"}),
              "ssm: [usage] --dt-min: must be greater than 0 but is nan" + more);
    EXPECT_EQ(complaint({"generate", "-n", "99999999999999999999"}),
              "ssm: [usage] --tokens: must be a whole number in [-9223372036854775808, 9223372036854775807] "
              "but is 99999999999999999999" +
                  more);
    for (const char* seed : {"-1", "18446744073709551616", "1.5", "x"}) {
        EXPECT_EQ(
            complaint({"generate", "--seed", seed}),
            std::string("ssm: [usage] --seed: must be a whole number in [0, 18446744073709551615] but is ") +
                seed + more);
    }
}

class CliErrors : public testing::Test {
protected:
    // The command's complaint, with the model's folder called DIR.
    std::string complaint(const Strings& arguments, const std::string& input = "") {
        std::string text = failure_of(arguments, input);
        for (size_t at; (at = text.find(model_.dir())) != std::string::npos;)
            text.replace(at, model_.dir().size(), "DIR");
        return text;
    }
    std::string generate(const Strings& more, const std::string& input = "") {
        Strings arguments{"generate", "--model", model_.dir(), "-n", "2"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return complaint(arguments, input);
    }
    std::string eval(const Strings& more) {
        Strings arguments{"eval", "--model", model_.dir()};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return complaint(arguments);
    }
    ByteModel model_;
};

TEST_F(CliErrors, Prompts) {
    const std::string empty =
        "ssm: [generate] the prompt is empty; give --prompt, --prompt-file, --ids or --load-state";
    EXPECT_EQ(generate({}), empty);
    EXPECT_EQ(generate({"--prompt", ""}), empty);
    EXPECT_EQ(generate({"--ids", " , "}), empty);
    EXPECT_EQ(generate({"--prompt-file", "-"}, ""), empty);
    EXPECT_NE(generate({"--prompt", "ok \xff no"}).find("UTF-8"), std::string::npos);
    EXPECT_NE(generate({"--prompt-file", "-"}, "\xc3(").find("UTF-8"), std::string::npos);
    EXPECT_EQ(generate({"--ids", "1 two 3"}), "ssm: [ids] 'two' is not a token id");
    EXPECT_EQ(generate({"--ids", "1 99999999999"}), "ssm: [ids] '99999999999' is not a token id");
    EXPECT_EQ(generate({"--ids", "1 257"}), "ssm: [model] token id 257 is outside the vocabulary of 257");
    EXPECT_EQ(generate({"--ids", "-1"}), "ssm: [model] token id -1 is outside the vocabulary of 257");
    EXPECT_EQ(generate({"--prompt-file", "/nowhere"}), "ssm: [file] /nowhere: does not exist");
    EXPECT_EQ(generate({"--prompt-file", model_.dir()}), "ssm: [file] DIR: is a directory");
}

// What is missing, by how it was built; on a machine with a GPU nothing is (the tests with label gpu run
// there).
TEST_F(CliErrors, NoGpu) {
    const ProgramResult r =
        run_ssm({"generate", "--model", model_.dir(), "--prompt", "a", "--device", "cuda"});
    if (kHasCuda && r.exit_code == 0) GTEST_SKIP() << "this machine has a GPU";
    EXPECT_EQ(r.err,
              kHasCuda
                  ? "ssm: [device] the NVIDIA driver is missing or older than this CUDA; use --device cpu\n"
                  : "ssm: [device] this build has no CUDA; use --device cpu\n");
}

TEST_F(CliErrors, Options) {
    for (const Strings& wrong :
         {Strings{"--temperature", "-1"}, Strings{"--top-p", "0"}, Strings{"--top-p", "1.5"},
          Strings{"--min-p", "-0.5"}, Strings{"--repetition-penalty", "0"}, Strings{"--temperature", "nan"},
          Strings{"--top-k", "-2"}}) {
        Strings arguments{"--prompt", "a"};
        arguments.insert(arguments.end(), wrong.begin(), wrong.end());
        EXPECT_EQ(generate(arguments).rfind("ssm: [sample", 0), 0u) << wrong[0];
    }
    fs::remove(model_.folder / "tokenizer.json");
    EXPECT_EQ(generate({"--prompt", "a"}),
              "ssm: [generate] the model folder has no tokenizer.json; give the prompt as --ids");
    EXPECT_EQ(generate({"--ids", "1", "--stop", "x"}), "ssm: [generate] stop strings need a tokenizer");
}

TEST_F(CliErrors, Models) {
    EXPECT_EQ(complaint({"inspect", "/nowhere"}), "ssm: [file] /nowhere/config.json: does not exist");
    EXPECT_EQ(complaint({"generate", "--model", "/nowhere", "--prompt", "a"}),
              "ssm: [file] /nowhere/config.json: does not exist");
    const std::string config = read_file(model_.folder / "config.json"),
                      weights = read_file(model_.folder / "model.safetensors");
    const auto with_config = [&](const std::string& text) {
        model_.folder.file("config.json", text);
        const std::string message = generate({"--ids", "1"});
        model_.folder.file("config.json", config);
        return message;
    };
    EXPECT_EQ(with_config("").rfind("ssm: [config] ", 0), 0u);
    EXPECT_EQ(with_config("{\"model_type\": ").rfind("ssm: [config] ", 0), 0u);
    EXPECT_EQ(with_config(std::string(100'000, '[')).rfind("ssm: [config] ", 0), 0u);
    EXPECT_EQ(with_config("[]"), "ssm: [config] the file does not hold an object");
    EXPECT_EQ(with_config("{\"model_type\": \"a\\nb\"}").rfind("ssm: [config] unknown 'model_type' ", 0), 0u);

    const auto with_weights = [&](const std::string& bytes) {
        model_.folder.file("model.safetensors", bytes);
        return generate({"--ids", "1"});
    };
    const std::string size_lie = std::string(6, '\xff') + std::string(2, '\x7f');
    for (const std::string& bytes :
         {std::string("abc"), weights.substr(0, 100), weights.substr(0, weights.size() / 2), weights + "x",
          size_lie + weights.substr(8), std::string(4096, '\0')}) {
        EXPECT_EQ(with_weights(bytes).rfind("ssm: [safetensors] DIR/model.safetensors: ", 0), 0u);
    }
    EXPECT_EQ(with_weights(""), "ssm: [file] DIR/model.safetensors: is empty");
}

TEST_F(CliErrors, Tokenizers) {
    const std::string good = read_file(model_.folder / "tokenizer.json");
    for (const std::string& text :
         {std::string("{}"), std::string("null"), good.substr(0, good.size() / 2), std::string(1 << 20, '['),
          std::string("{\"model\": {\"type\": \"Unigram\"}}")}) {
        model_.folder.file("tokenizer.json", text);
        EXPECT_EQ(generate({"--prompt", "a"}).rfind("ssm: [tokenizer] ", 0), 0u);
    }
}

TEST_F(CliErrors, TokenizerCommand) {
    const std::string file = model_.folder / "tokenizer.json";
    EXPECT_NE(complaint({"tokenizer", "encode", "--tokenizer", file, "--text", "a\xff"}).find("UTF-8"),
              std::string::npos);
    EXPECT_EQ(complaint({"tokenizer", "decode", "--tokenizer", file, "--ids", "1 257"})
                  .rfind("ssm: [tokenizer] ", 0),
              0u);
    EXPECT_EQ(complaint({"tokenizer", "decode", "--tokenizer", file, "--ids", "x"}),
              "ssm: [ids] 'x' is not a token id");
    EXPECT_NE(complaint({"tokenizer", "encode", "--tokenizer", "/nowhere", "--text", "a"}).find("/nowhere"),
              std::string::npos);
}

TEST_F(CliErrors, Eval) {
    const auto ids = [&](const std::string& bytes) {
        return eval({"--ids", model_.folder.file("ids", bytes)});
    };
    EXPECT_EQ(eval({}), "ssm: [eval] give either --ids FILE or --text FILE");
    EXPECT_EQ(ids("abc"), "ssm: [ids] DIR/ids: 3 bytes are no whole number of uint16");
    EXPECT_EQ(ids(std::string("\1\0", 2)), "ssm: [eval] at least 2 tokens are needed but there are 1");
    EXPECT_EQ(ids(""), "ssm: [file] DIR/ids: is empty");
    EXPECT_NE(ids(std::string("\1\0\1\1", 4)).find("257"), std::string::npos);  // the last id, a target only
    EXPECT_NE(ids(std::string("\1\0\xff\xff\1\0", 6)).find("65535"), std::string::npos);
    EXPECT_EQ(eval({"--text", "/nowhere"}), "ssm: [file] /nowhere: does not exist");
    EXPECT_NE(eval({"--text", model_.folder.file("text", "a\xff")}).find("UTF-8"), std::string::npos);
}

TEST_F(CliErrors, States) {
    const ByteModel other({}, 2);
    const std::string state = other.folder / "state";
    ASSERT_EQ(run_ssm({"generate", "--model", other.dir(), "--prompt", "a", "-n", "1", "--save-state", state})
                  .exit_code,
              0);
    EXPECT_EQ(generate({"--load-state", state}),
              "ssm: [state] " + state + " was saved with another model or another dtype");
    EXPECT_EQ(complaint({"generate", "--model", other.dir(), "--dtype", "bf16", "--load-state", state}),
              "ssm: [state] " + state + " was saved with another model or another dtype");
    EXPECT_EQ(
        generate({"--load-state", model_.folder.file("noise", "noise")}).rfind("ssm: [safetensors] ", 0), 0u);
    EXPECT_EQ(
        generate({"--load-state", model_.dir() + "/model.safetensors"}),
        "ssm: [state] DIR/model.safetensors is not a saved state of this version (\"ssm.cpp session 1\")");
}

// Not by permissions, which do not bind root: places where no file can be.
TEST_F(CliErrors, PlacesThatCannotBeWritten) {
    const std::string below = model_.folder.file("file", "x").string() + "/below";
    for (const std::string& place : {below, std::string("/proc/no-such-place")}) {
        const ProgramResult r =
            run_ssm({"generate", "--model", model_.dir(), "--prompt", "a", "-n", "1", "--save-state", place});
        EXPECT_EQ(r.exit_code, 1);
        EXPECT_EQ(r.err.rfind("ssm: [file] ", 0), 0u) << r.err;
        EXPECT_EQ(complaint({"convert", model_.dir(), "--out", place}).rfind("ssm: [checkpoint] ", 0), 0u);
    }
    EXPECT_EQ(read_file(model_.folder / "file"), "x");
    EXPECT_EQ(complaint({"tokenizer", "train", "--data", "/nowhere.txt", "--out", below + ".json"}),
              "ssm: [file] DIR/file/below.json: cannot be written: Not a directory");
}

// Known before the model reads and writes, not after.
TEST_F(CliErrors, AStateThatCannotBeSavedIsKnownFirst) {
    EXPECT_EQ(generate({"--prompt", "a", "--save-state", model_.dir()}),
              "ssm: [file] DIR: cannot be written: it is a directory");
    const fs::path pipe = model_.folder / "pipe";
    ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
    EXPECT_EQ(generate({"--prompt", "a", "--save-state", pipe}),
              "ssm: [file] DIR/pipe: cannot be written: it is not a regular file");
    EXPECT_TRUE(fs::is_fifo(pipe));
}

TEST_F(CliErrors, Bench) {
    EXPECT_EQ(complaint({"bench", "--model", model_.dir(), "--pp", "0", "--tg", "0"}),
              "ssm: [bench] nothing to measure: --pp, --tg and --train-length are 0");
    EXPECT_EQ(complaint({"bench", "--model", model_.dir(), "--shape", "mamba-130m"}),
              "ssm: [bench] give one of --model, --shape and --config");
    EXPECT_EQ(complaint({"bench", "--config", model_.folder.file("c.json", "x")}).rfind("ssm: [config] ", 0),
              0u);
}

TEST_F(CliErrors, AModelIsNotConvertedOntoItself) {
    const std::string weights = read_file(model_.folder / "model.safetensors");
    for (const std::string& out : {model_.dir(), model_.dir() + "/."}) {
        EXPECT_EQ(complaint({"convert", model_.dir(), "--out", out, "--dtype", "bf16"}),
                  "ssm: [convert] --out is the model folder itself; give another, so that nothing is lost");
    }
    EXPECT_EQ(read_file(model_.folder / "model.safetensors"), weights);
}

// What cannot be printed is not success.
TEST_F(CliErrors, FullStandardOutput) {
    if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
    const fs::path err = model_.folder / "err";
    const std::string command =
        std::string(SSM_PROGRAM) + " inspect " + model_.dir() + " > /dev/full 2> " + err.string();
    const int status = std::system(command.c_str());
    EXPECT_EQ(WEXITSTATUS(status), 1);
    EXPECT_EQ(read_file(err), "ssm: [stdout] cannot be written\n");
}

}  // namespace
}  // namespace ssm::test
