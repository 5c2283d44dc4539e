#include "ssm/io/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "ssm/core/error.h"
#include "tests/support/shared.h"

namespace ssm {
namespace {

using nlohmann::json;

json read_json(const std::filesystem::path& path) {
    std::ifstream in(path);
    return json::parse(in);
}

// Every case of a golden file: ids, ids with special tokens, decoded text, and the streamed text.
void expect_golden(const Tokenizer& tokenizer, const json& golden) {
    for (const json& c : golden.at("cases")) {
        const auto text = c.at("text").get<std::string>();
        const auto ids = c.at("ids").get<std::vector<int32_t>>();
        const auto special = c.value("ids_with_special", ids);
        EXPECT_EQ(tokenizer.encode(text), ids) << text;
        EXPECT_EQ(tokenizer.encode(text), ids) << "from the cache: " << text;
        EXPECT_EQ(tokenizer.encode(text, true), special) << text;
        EXPECT_EQ(tokenizer.decode(ids, false), c.value("decoded", text));
        StreamDecoder stream(tokenizer, false);
        std::string streamed;
        for (const int32_t id : ids) streamed += stream.push(id);
        EXPECT_EQ(streamed + stream.flush(), c.value("decoded", text));
    }
}

class SharedGolden : public testing::TestWithParam<const char*> {};

TEST_P(SharedGolden, EncodesAndDecodes) {
    const auto shared = test::shared_dir();
    if (shared.empty()) GTEST_SKIP() << "no shared folder: set SSM_SHARED";
    const std::string name = GetParam();
    const auto tokenizer = Tokenizer::load(shared / "tokenizers" / name / "tokenizer.json.zst");
    const json golden = read_json(shared / "tokenizers" / "golden" / (name + ".json"));
    ASSERT_EQ(golden.at("cases").size(), 47u);
    expect_golden(tokenizer, golden);
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, SharedGolden,
                         testing::Values("gpt-neox-20b", "gpt2", "qwen3", "mistral-v1"));

}  // namespace
}  // namespace ssm
