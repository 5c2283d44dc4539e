// The command's results: what each subcommand prints, and that runs which must agree do.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/byte_model.h"
#include "tests/support/run_program.h"
#include "tests/support/shared.h"

namespace ssm::test {
namespace {

using nlohmann::json;
using Strings = std::vector<std::string>;

constexpr auto kMamba2 = ReferenceShape::Kind::mamba2;

std::set<std::string> keys(const json& object) {
    std::set<std::string> names;
    for (const auto& [key, value] : object.items()) names.insert(key);
    return names;
}

Strings with(Strings first, const Strings& more) {
    first.insert(first.end(), more.begin(), more.end());
    return first;
}

// Raw little-endian ids.
std::string id_bytes(const std::vector<int32_t>& ids, size_t width) {
    std::string bytes;
    for (const int32_t id : ids) {
        for (size_t i = 0; i < width; ++i) bytes += static_cast<char>(id >> (8 * i) & 0xff);
    }
    return bytes;
}

TEST(CliGenerate, Json) {
    const ByteModel m;
    const json r = json_of(
        {"generate", "--model", m.dir(), "--prompt", "ab", "-n", "12", "--greedy", "--ignore-eos", "--json"});
    EXPECT_EQ(keys(r), (std::set<std::string>{"prompt_ids", "ids", "text", "prefill_tokens_per_second",
                                              "decode_tokens_per_second", "state_bytes", "weights_bytes"}));
    EXPECT_EQ(r["prompt_ids"], (json{97, 98}));
    EXPECT_EQ(r["ids"].size(), 12u);
    EXPECT_GT(r["prefill_tokens_per_second"], 0);
    EXPECT_GT(r["decode_tokens_per_second"], 0);
    EXPECT_EQ(r["state_bytes"], 2 * 16 * (3 + 4) * 4);
    // 257 embeddings and a final norm of width 8; of each layer: its parameters as the shapes say.
    const int layer = 8 + 16 * 4 + 16 + 16 * 4 + 16 + 32 * 8 + 10 * 16 + 16 * 2 + 16 + 8 * 16;
    EXPECT_EQ(r["weights_bytes"], 4 * (257 * 8 + 8 + 2 * layer));
    const json half =
        json_of({"generate", "--model", m.dir(), "--prompt", "ab", "-n", "1", "--dtype", "bf16", "--json"});
    EXPECT_LT(half["weights_bytes"], r["weights_bytes"]);
}

TEST(CliGenerate, StreamsWhatJsonSays) {
    const ByteModel m;
    const Strings command{"generate", "--model", m.dir(), "--prompt", "hello", "-n", "30", "--seed", "4"};
    const ProgramResult plain = run_ssm(command);
    EXPECT_EQ(plain.exit_code, 0);
    EXPECT_EQ(plain.out, "hello" + json_of(with(command, {"--json"}))["text"].get<std::string>() + "\n");
    EXPECT_NE(plain.err.find("tokens/s"), std::string::npos);
    // The prompt may also come from a file or from stdin.
    const std::string file = m.folder.file("prompt.txt", "hello");
    const Strings rest{"-n", "30", "--seed", "4", "--json"};
    const auto ids = json_of(with(command, {"--json"}))["ids"];
    EXPECT_EQ(json_of(with({"generate", "--model", m.dir(), "--prompt-file", file}, rest))["ids"], ids);
    const ProgramResult from_stdin =
        run_ssm(with({"generate", "--model", m.dir(), "--prompt-file", "-"}, rest), "hello");
    EXPECT_EQ(from_stdin.json()["ids"], ids);
    EXPECT_EQ(json_of(with({"generate", "--model", m.dir(), "--ids", "104,101 108 108\t111"}, rest))["ids"],
              ids);
}

TEST(CliGenerate, ThreadsDoNotChangeTheText) {
    const ByteModel m({.e = 32, .d = 64, .n = 16});
    const Strings command{"generate", "--model", m.dir(),  "--prompt", "hello",
                          "-n",       "40",      "--seed", "4",        "--json"};
    EXPECT_EQ(json_of(with(command, {"--threads", "1"}))["ids"],
              json_of(with(command, {"--threads", "2"}))["ids"]);
}

TEST(CliGenerate, StopsBeforeAString) {
    const ByteModel m;
    const Strings command{"generate", "--model", m.dir(), "--ids",        "1 2 3", "-n",
                          "60",       "--seed",  "2",     "--ignore-eos", "--json"};
    const auto whole = json_of(command);
    // A stop string of one byte that is a character on its own and does occur.
    int32_t stop = -1;
    for (const int32_t id : whole["ids"]) stop = stop < 0 && id > 32 && id < 127 ? id : stop;
    ASSERT_GE(stop, 0);
    const std::string text(1, static_cast<char>(stop));
    const json stopped = json_of(with(command, {"--stop", "never there", "--stop", text}));
    const auto full = whole["text"].get<std::string>();
    EXPECT_EQ(stopped["text"], full.substr(0, full.find(text)));
    EXPECT_LT(stopped["ids"].size(), whole["ids"].size());
}

// A state saved by one process and continued by another gives the tokens of one run.
TEST(CliGenerate, SavedStateContinuesInANewProcess) {
    for (const Strings& how :
         {Strings{"--greedy"}, Strings{"--temperature", "1.4", "--seed", "11", "--repetition-penalty", "1.3"},
          Strings{"--temperature", "1.4", "--top-k", "40", "--dtype", "bf16"}}) {
        const ByteModel m(how.size() == 1 ? ReferenceShape{} : ReferenceShape{.kind = kMamba2});
        const std::string state = m.folder / "state";
        const Strings common = with({"generate", "--model", m.dir(), "--ignore-eos", "--json"}, how);
        const json whole = json_of(with(common, {"--prompt", "Once", "-n", "30"}));
        json ids = json_of(with(common, {"--prompt", "Once", "-n", "11", "--save-state", state}))["ids"];
        ASSERT_EQ(ids.size(), 11u);
        const json rest = json_of(with(common, {"--load-state", state, "-n", "19"}));
        EXPECT_EQ(rest["prompt_ids"], json::array());
        for (const json& id : rest["ids"]) ids.push_back(id);
        EXPECT_EQ(ids, whole["ids"]);
        // A prompt after a loaded state goes on, too.
        EXPECT_EQ(json_of(with(common, {"--prompt", "On", "-n", "0", "--save-state", state}))["ids"],
                  json::array());
        EXPECT_EQ(json_of(with(common, {"--load-state", state, "--prompt", "ce", "-n", "30"}))["ids"],
                  whole["ids"]);
    }
}

TEST(CliEval, JsonAndCarriedState) {
    const ByteModel m;
    const auto ids = PackedTokens({101}, 256).ids;
    const std::string file = m.folder.file("ids", id_bytes(ids, 2)),
                      wide = m.folder.file("ids32", id_bytes(ids, 4));
    const Strings common{"eval", "--model", m.dir(), "--json", "--ids", file};
    const json whole = json_of(with(common, {"--window", "100"}));
    EXPECT_EQ(keys(whole), (std::set<std::string>{"tokens", "mean_nll", "perplexity", "tokens_per_second"}));
    EXPECT_EQ(whole["tokens"], 100);
    const double nll = whole["mean_nll"];
    EXPECT_NEAR(whole["perplexity"], std::exp(nll), 1e-6 * std::exp(nll));
    // A carried state is one window; without it, windows differ.
    EXPECT_NEAR(json_of(with(common, {"--window", "7", "--carry-state"}))["mean_nll"], nll, 1e-5 * nll);
    EXPECT_GT(std::abs(json_of(with(common, {"--window", "7"}))["mean_nll"].get<double>() - nll), 1e-4);
    const json from_wide = json_of(
        {"eval", "--model", m.dir(), "--json", "--ids", wide, "--ids-type", "uint32", "--window", "100"});
    EXPECT_EQ(from_wide["mean_nll"], whole["mean_nll"]);
    // Text: the likelihood of its bytes.
    const std::string text = m.folder.file("text", "The cat sat on the mat.");
    const json of_text = json_of({"eval", "--model", m.dir(), "--json", "--text", text});
    EXPECT_EQ(of_text["tokens"], 22);
    const double bits = of_text["mean_nll"].get<double>() * 22 / std::log(2.0) / 23;
    EXPECT_NEAR(of_text["bits_per_byte"], bits, 1e-9);
    // The same as a zstd frame of one raw block of 23 bytes.
    const std::string frame = std::string("\x28\xb5\x2f\xfd\x20\x17\xb9\0\0", 9) + "The cat sat on the mat.";
    const std::string packed = m.folder.file("text.zst", frame);
    EXPECT_EQ(json_of({"eval", "--model", m.dir(), "--json", "--text", packed})["mean_nll"],
              of_text["mean_nll"]);
}

TEST(CliVerify, PassesAndFails) {
    const std::string golden = golden_model("mamba_ssm_mamba2");
    const json r = json_of({"verify", golden, "--json"});
    EXPECT_EQ(r["ok"], true);
    EXPECT_EQ(keys(r["quantities"][0]), (std::set<std::string>{"name", "error", "tolerance", "ok"}));
    std::set<std::string> names;
    for (const json& q : r["quantities"]) names.insert(q["name"]);
    for (const char* name : {"logits", "loss", "greedy", "grad.backbone.layers.1.mixer.dt_bias"})
        EXPECT_TRUE(names.contains(name)) << name;

    const TempFolder copy;
    for (const char* name : {"config.json", "model.safetensors"})
        std::filesystem::copy_file(std::filesystem::path(golden) / name, copy / name);
    std::string bytes = read_file(std::filesystem::path(golden) / "expected.safetensors");
    bytes[bytes.size() - 2] ^= 0x40;  // the last number's exponent
    copy.file("expected.safetensors", bytes);
    const ProgramResult failed = run_ssm({"verify", copy.path().string(), "--json"});
    EXPECT_EQ(failed.exit_code, 1);
    EXPECT_EQ(failed.json()["ok"], false);
    EXPECT_EQ(failed.err.rfind("ssm: [verify] 1 of ", 0), 0u) << failed.err;
    const ProgramResult plain = run_ssm({"verify", copy.path().string()});
    EXPECT_EQ(plain.exit_code, 1);
    EXPECT_NE(plain.out.find("FAIL"), std::string::npos);
}

// A model's expectation may be recorded; then it holds, and only for that model.
TEST(CliVerify, Record) {
    const ByteModel m, other({}, 2);
    EXPECT_EQ(run_ssm({"verify", m.dir(), "--record"}).exit_code, 0);
    EXPECT_EQ(json_of({"verify", m.dir(), "--json"})["ok"], true);
    std::filesystem::copy_file(m.folder / "expected.safetensors", other.folder / "expected.safetensors");
    EXPECT_EQ(run_ssm({"verify", other.dir(), "--json"}).exit_code, 1);
}

TEST(CliVerify, EveryFixture) {
    for (const char* name : {"mamba", "mamba2", "falcon_mamba", "mamba_ssm_mamba1", "mamba_ssm_mamba2"}) {
        const std::string dir = golden_model(name);
        if (dir.empty()) continue;
        EXPECT_EQ(json_of({"verify", dir, "--json"})["ok"], true) << name;
        EXPECT_EQ(json_of({"verify", dir, "--json", "--dtype", "bf16"})["ok"], true) << name;
    }
}

TEST(CliInspect, Json) {
    const ByteModel m({.kind = kMamba2, .tied = false});
    const json r = json_of({"inspect", m.dir(), "--json"});
    EXPECT_EQ(keys(r), (std::set<std::string>{"architecture", "layout", "layers", "hidden_size", "vocab_size",
                                              "tied_embeddings", "parameters", "parameters_by_part",
                                              "state_bytes", "contexts"}));
    EXPECT_EQ(r["architecture"], "mamba2");
    EXPECT_EQ(r["tied_embeddings"], false);
    int64_t sum = 0;
    for (const auto& [part, count] : r["parameters_by_part"].items()) sum += count.get<int64_t>();
    EXPECT_EQ(sum, r["parameters"]);
    EXPECT_EQ(r["parameters_by_part"]["lm_head"], 257 * 8);
    for (const json& c : r["contexts"]) {
        EXPECT_EQ(c["state_bytes"], r["state_bytes"]);  // constant in the length
        EXPECT_EQ(c["kv_cache_bytes"], 2 * 2 * 8 * 4 * c["tokens"].get<int64_t>());
    }
    EXPECT_EQ(r["contexts"].back()["tokens"], 1 << 20);
    EXPECT_EQ(run_ssm({"inspect", m.dir()}).exit_code, 0);
}

TEST(CliBench, Json) {
    const ByteModel m;
    const json r = json_of({"bench", "--model", m.dir(), "--pp", "9", "--tg", "3", "--repeats", "2",
                            "--threads", "2", "--json"});
    ASSERT_EQ(r.size(), 2u);
    EXPECT_EQ(r[0]["test"], "pp9");
    EXPECT_EQ(r[1]["test"], "tg3");
    for (const json& test : r) {
        for (const char* key : {"tokens_per_second", "repeats", "threads", "dtype", "percent_of_floor"})
            EXPECT_TRUE(test.contains(key)) << key;
        EXPECT_GT(test["tokens_per_second"], 0);
        EXPECT_GT(test["percent_of_floor"], 0);
        EXPECT_EQ(test["repeats"], 2);
        EXPECT_EQ(test["threads"], 2);
        EXPECT_EQ(test["dtype"], "f32");
    }
    const json deep = json_of({"bench", "--model", m.dir(), "--pp", "0", "--tg", "2", "--depth", "600",
                               "--repeats", "1", "--threads", "1", "--json"});
    EXPECT_EQ(deep[0]["test"], "tg2@600");
}

TEST(CliDoctor, Json) {
    const json r = json_of({"doctor", "--threads", "1", "--json"});
    EXPECT_EQ(r["cpu"]["threads"], 1);
    EXPECT_NE(r["cpu"]["instructions"], "");
    for (const char* key :
         {"read_gigabytes_per_second", "f32_gigaflop_per_second", "bf16_gigaflop_per_second"})
        EXPECT_GT(r["cpu"][key], 0) << key;
    // Every operator was compared; without a GPU it says why there is none.
    EXPECT_EQ(r["gpus"].empty(), r.contains("no_gpu"));
    EXPECT_GE(r["checks"].size(), 11u);
    for (const json& check : r["checks"]) EXPECT_EQ(check["ok"], true) << check;
}

// There and back is the same bytes; in between, the same tokens.
TEST(CliConvert, RoundTrip) {
    const ByteModel m;
    const TempFolder folder;
    const std::string there = folder / "there", back = folder / "back";
    EXPECT_EQ(
        run_ssm({"convert", m.dir(), "--out", there, "--layout", "mamba_ssm", "--max-shard-bytes", "4000"})
            .exit_code,
        0);
    EXPECT_TRUE(std::filesystem::exists(std::filesystem::path(there) / "model.safetensors.index.json"));
    EXPECT_EQ(json_of({"inspect", there, "--json"})["layout"], "mamba_ssm");
    EXPECT_EQ(run_ssm({"convert", there, "--out", back}).exit_code, 0);
    for (const char* name : {"model.safetensors", "tokenizer.json"})
        EXPECT_EQ(read_file(std::filesystem::path(back) / name), read_file(m.folder / name)) << name;
    const auto ids = [](const std::string& dir) {
        return json_of(
            {"generate", "--model", dir, "--prompt", "ab", "-n", "9", "--greedy", "--json"})["ids"];
    };
    EXPECT_EQ(ids(there), ids(m.dir()));
}

// A tokenizer trained here encodes and decodes what it saw and what it did not.
TEST(CliTokenizer, TrainEncodeDecode) {
    const TempFolder folder;
    std::string corpus;
    for (int i = 0; i < 50; ++i) corpus += "the cat and the hat sat there\n<|endoftext|>\n";
    const std::string data = folder.file("text.txt", corpus), file = folder / "tokenizer.json";
    const json trained =
        json_of({"tokenizer", "train", "--data", data, "--vocab-size", "270", "--out", file, "--json"});
    EXPECT_EQ(keys(trained), (std::set<std::string>{"file", "vocab_size", "documents", "bytes"}));
    EXPECT_EQ(trained["vocab_size"], 270);
    EXPECT_EQ(trained["documents"], 50);
    const std::string text = "the cat \xc3\xa9t\xc3\xa9 \xe2\x82\xac", plain = "the cat and the hat";
    const json encoded = json_of({"tokenizer", "encode", "--tokenizer", file, "--text", text, "--json"});
    EXPECT_EQ(keys(encoded), (std::set<std::string>{"ids", "tokens"}));
    EXPECT_EQ(encoded["ids"].size(), encoded["tokens"].size());
    std::string ids;
    for (const json& id : encoded["ids"]) ids += id.dump() + " ";
    EXPECT_EQ(json_of({"tokenizer", "decode", "--tokenizer", file, "--ids", ids, "--json"}),
              json({{"text", text}}));
    EXPECT_EQ(run_ssm({"tokenizer", "decode", "--tokenizer", file, "--ids", ids}).out, text + "\n");
    // It learned something: fewer ids than bytes.
    EXPECT_LT(json_of({"tokenizer", "encode", "--tokenizer", file, "--text", plain, "--json"})["ids"].size(),
              plain.size() - 4);
}

// The real checkpoint, as its makers measured it.
class Stories : public testing::Test {
protected:
    void SetUp() override {
        if (!std::filesystem::exists(dir_ / "reference.json"))
            GTEST_SKIP() << "needs the shared checkpoint mamba-stories (SSM_SHARED)";
        reference_ = json::parse(read_file(dir_ / "reference.json"));
    }
    // Of the first windows of 512 tokens; sanitizers are too slow for all 32 of them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    static constexpr int kWindows = 1;
#else
    static constexpr int kWindows = 32;
#endif
    static constexpr int kTokens = std::min(512 * kWindows, 16383);
    double mean_nll(const Strings& more) {
        const TempFolder folder;
        const std::string ids =
            folder.file("ids", read_file(dir_ / "valid_ids.bin").substr(0, 2 * (kTokens + 1)));
        const json r =
            json_of(with({"eval", "--model", dir_, "--ids", ids, "--window", "512", "--json"}, more));
        EXPECT_EQ(r["tokens"], kTokens);
        return r["mean_nll"];
    }
    double expected_nll() const {
        double sum = 0;
        for (int i = 0; i < kWindows; ++i) sum += reference_["nll_per_window"][i].get<double>();
        return sum / kTokens;
    }
    std::filesystem::path dir_ = shared_dir() / "checkpoints/mamba-stories";
    json reference_;
};

TEST_F(Stories, LossAsMeasured) {
    EXPECT_NEAR(mean_nll({}), expected_nll(), 5e-4);
    EXPECT_NEAR(mean_nll({"--dtype", "bf16"}), expected_nll(), 1e-2);
    if (kWindows == 32) {
        EXPECT_NEAR(expected_nll(), 2.8168, 5e-5);
    }
}

TEST_F(Stories, GreedyContinuationsAsMeasured) {
    ASSERT_FALSE(reference_["greedy"].empty());
    for (const json& g : reference_["greedy"]) {
        const size_t prompt = g["prompt_ids"].size(), total = g["ids"].size();
        const json r = json_of({"generate", "--model", dir_, "--prompt", g["prompt"], "--greedy",
                                "--ignore-eos", "-n", std::to_string(total - prompt), "--json"});
        EXPECT_EQ(r["prompt_ids"], g["prompt_ids"]);
        json ids = r["prompt_ids"];
        for (const json& id : r["ids"]) ids.push_back(id);
        EXPECT_EQ(ids, g["ids"]);
        EXPECT_EQ(g["prompt"].get<std::string>() + r["text"].get<std::string>(), g["text"]);
    }
}

}  // namespace
}  // namespace ssm::test
