#include "ssm/io/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "ssm/core/error.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

std::filesystem::path testdata(const std::string& name) {
    return test::source_dir() / "ssm/io/tokenizer/testdata" / name;
}

json read_json(const std::filesystem::path& path) {
    std::ifstream in(path);
    return json::parse(in);
}

// A byte-level tokenizer.json without merges, "a" = 'a' and so on for bytes 'a'..'h', ab = 8; edited by a
// test.
json small_json() {
    json vocab;
    for (int i = 0; i < 8; ++i) vocab[std::string(1, static_cast<char>('a' + i))] = i;
    vocab["ab"] = 8;
    return {{"version", "1.0"},
            {"added_tokens", json::array()},
            {"normalizer", nullptr},
            {"pre_tokenizer", nullptr},
            {"post_processor", nullptr},
            {"decoder", nullptr},
            {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b"}}}}};
}

json added_token(int id, const std::string& content, json more = json::object()) {
    json token = {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                  {"rstrip", false}, {"normalized", false}, {"special", false}};
    token.update(more);
    return token;
}

// Every case of a golden file: ids, ids with special tokens, decoded text, and the streamed text.
void expect_golden(const Tokenizer& tokenizer, const json& golden) {
    for (const json& c : golden.at("cases")) {
        const auto text = c.at("text").get<std::string>();
        const auto ids = c.at("ids").get<Ids>();
        const auto special = c.value("ids_with_special", ids);
        EXPECT_EQ(tokenizer.encode(text), ids) << text;
        EXPECT_EQ(tokenizer.encode(text), ids) << "from the cache: " << text;
        EXPECT_EQ(tokenizer.encode(text, true), special) << text;
        EXPECT_EQ(tokenizer.decode(ids, false), c.value("decoded", text));
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

class OwnGolden : public testing::TestWithParam<const char*> {};

TEST_P(OwnGolden, EncodesAndDecodes) {
    const std::string name = GetParam();
    const json golden = read_json(testdata(name + "_golden.json"));
    ASSERT_EQ(golden.at("cases").size(), 22u);
    expect_golden(Tokenizer::load(testdata(name + ".json")), golden);
}

// Random ids make every kind of broken UTF-8: the joined stream is what decode gives, and each text is whole.
TEST_P(OwnGolden, StreamEqualsDecode) {
    const auto tokenizer = Tokenizer::load(testdata(std::string(GetParam()) + ".json"));
    std::mt19937 random(1);
    for (int round = 0; round < 2000; ++round) {
        Ids ids(random() % 12);
        for (auto& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(tokenizer.size()));
        StreamDecoder stream(tokenizer);
        std::string streamed;
        for (const int32_t id : ids) {
            const std::string text = stream.push(id);
            EXPECT_NO_THROW(tokenizer.encode(text)) << "not whole characters";
            streamed += text;
        }
        EXPECT_EQ(streamed + stream.flush(), tokenizer.decode(ids));
        EXPECT_EQ(stream.flush(), "");
    }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, OwnGolden, testing::Values("trained", "mistral_cut"));

TEST(StreamDecoder, HoldsACharacterBackUntilItIsWhole) {
    const auto tokenizer = Tokenizer::load(testdata("trained.json"));
    const std::string smile = "\xF0\x9F\x99\x82";
    const Ids ids = tokenizer.encode(smile + "!");
    StreamDecoder stream(tokenizer);
    std::vector<std::string> texts;
    for (const int32_t id : ids) texts.push_back(stream.push(id));
    ASSERT_GT(ids.size(), 2u);
    for (size_t i = 0; i + 2 < ids.size(); ++i) EXPECT_EQ(texts[i], "");
    EXPECT_EQ(texts[ids.size() - 2], smile);
    EXPECT_EQ(texts.back(), "!");
    stream.push(ids[0]);
    EXPECT_EQ(stream.flush(), "\xEF\xBF\xBD") << "cut characters appear when nothing can follow";
    EXPECT_EQ(stream.push(1 << 20), "") << "a padded embedding row adds nothing";
}

TEST(Tokenizer, SkipsSpecialTokens) {
    const auto tokenizer = Tokenizer::load(testdata("mistral_cut.json"));
    const Ids ids = tokenizer.encode("The river", true);
    ASSERT_EQ(ids.front(), 1);
    EXPECT_EQ(tokenizer.decode(ids), "The river");
    EXPECT_EQ(tokenizer.decode(ids, false), "<s> The river");
    EXPECT_TRUE(tokenizer.is_special(1));
    EXPECT_FALSE(tokenizer.is_special(ids.back()));
    EXPECT_EQ(tokenizer.id_of("</s>"), 2);
    EXPECT_EQ(tokenizer.token(2), "</s>");
    EXPECT_EQ(tokenizer.id_of("no such token"), std::nullopt);
}

// The definition: merge the pair of lowest rank, leftmost first, until none is left.
std::vector<std::string> merge_by_definition(const std::string& text,
                                             const std::vector<std::string>& merges) {
    std::vector<std::string> symbols;
    for (const char c : text) symbols.emplace_back(1, c);
    while (true) {
        size_t best = merges.size(), place = 0;
        for (size_t i = 0; i + 1 < symbols.size(); ++i) {
            const auto found = std::ranges::find(merges, symbols[i] + ' ' + symbols[i + 1]);
            const auto rank = static_cast<size_t>(found - merges.begin());
            if (rank < best) best = rank, place = i;
        }
        if (best == merges.size()) return symbols;
        symbols[place] += symbols[place + 1];
        symbols.erase(symbols.begin() + static_cast<int64_t>(place) + 1);
    }
}

// Pieces below and above the limit of the quadratic path (48 symbols), with merges that overlap.
TEST(Tokenizer, MatchesReference) {
    json document = small_json();
    const std::vector<std::string> merges = {"a a",   "b a", "aa b",   "a b",   "ba ba", "b b",
                                             "aab a", "c a", "baba c", "ab ab", "c c",   "aa aa"};
    document["model"]["merges"] = merges;
    for (int id = 9; const auto& merge : merges) {
        std::string token = merge;
        token.erase(token.find(' '), 1);
        if (token != "ab") document["model"]["vocab"][token] = id++;
    }
    const auto tokenizer = Tokenizer::parse(document.dump());
    std::mt19937 random(2);
    for (size_t length = 0; length < 150; ++length) {
        std::string text;
        while (text.size() < length) text += "aaabbc"[random() % 6];
        std::vector<std::string> tokens;
        for (const int32_t id : tokenizer.encode(text)) tokens.emplace_back(tokenizer.token(id));
        EXPECT_EQ(tokens, merge_by_definition(text, merges)) << text;
    }
}

TEST(Tokenizer, IsSafeFromManyThreads) {
    const auto tokenizer = Tokenizer::load(testdata("trained.json"));
    const json golden = read_json(testdata("trained_golden.json"));
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int round = 0; round < 20; ++round) expect_golden(tokenizer, golden);
        });
    for (auto& thread : threads) thread.join();
}

TEST(Tokenizer, AddedTokens) {
    json document = small_json();
    document["added_tokens"] = {added_token(9, "cd"), added_token(10, "gh", {{"single_word", true}}),
                                added_token(11, "<x>", {{"lstrip", true}, {"rstrip", true}}),
                                added_token(12, "E", {{"normalized", true}})};
    document["normalizer"] = {{"type", "Lowercase"}};
    document["model"]["vocab"][" "] = 13;
    const auto tokenizer = Tokenizer::parse(document.dump());
    EXPECT_EQ(tokenizer.encode("acdb"), (Ids{0, 9, 1})) << "longest first";
    EXPECT_EQ(tokenizer.encode("agh gh"), (Ids{0, 6, 7, 13, 10})) << "only whole words";
    EXPECT_EQ(tokenizer.encode("a \n<x>\t b"), (Ids{0, 11, 1})) << "takes the spaces";
    EXPECT_EQ(tokenizer.encode("AeB"), (Ids{0, 12, 1})) << "matches after normalization";
    EXPECT_EQ(tokenizer.size(), 14);
}

TEST(Tokenizer, UnknownCharacters) {
    json document = small_json();
    EXPECT_EQ(Tokenizer::parse(document.dump()).encode("axyb"), (Ids{8})) << "dropped before merging";
    document["model"]["unk_token"] = "h";
    EXPECT_EQ(Tokenizer::parse(document.dump()).encode("axyb"), (Ids{0, 7, 7, 1}));
    document["model"]["fuse_unk"] = true;
    EXPECT_EQ(Tokenizer::parse(document.dump()).encode("axyb"), (Ids{0, 7, 1}));
    document["model"]["unk_token"] = "?";
    EXPECT_EQ(test::error_of([&] { Tokenizer::parse(document.dump()).encode("x"); }),
              "[tokenizer] unk_token '?' is not in model.vocab");
}

// Unicode's White_Space and nothing else, whatever the engine's own \s is.
// A piece is cut before its spaces only where the merges allow it.
TEST(Tokenizer, MergesAcrossSpaces) {
    const std::string space = "\xE2\x96\x81";
    json tokenizer = small_json();
    const auto encode = [&](json merges, const std::string& text) {
        json vocab = {{space, 0}, {"a", 1}, {"b", 2}, {space + "a", 3}, {"b" + space, 4}, {space + space, 5}};
        tokenizer["model"]["vocab"] = vocab;
        tokenizer["model"]["merges"] = std::move(merges);
        return Tokenizer::parse(tokenizer.dump()).encode(text);
    };
    const json within = {space + " a", space + " " + space}, across = {"b " + space, space + " a"};
    const std::string text = "ab" + space + "ab" + space + space + "a";
    tokenizer["model"]["unk_token"] = "b";
    EXPECT_EQ(encode(within, text), (Ids{1, 2, 3, 2, 0, 3}));
    EXPECT_EQ(encode(across, text), (Ids{1, 4, 1, 4, 3}));
    EXPECT_EQ(encode(within, space + "x" + space), (Ids{0, 2, 0}));
    // Without an unknown token a character outside the vocabulary is dropped, and its neighbours meet.
    tokenizer["model"].erase("unk_token");
    EXPECT_EQ(encode(within, space + "x" + space), (Ids{5}));
    EXPECT_EQ(encode(within, "a" + space + space + "b" + space + "a"), (Ids{1, 5, 2, 3}));
}

TEST(Tokenizer, SplitPatternsMeanWhatTheyMeantInOniguruma) {
    json document = small_json();
    const auto pieces = [&](const std::string& pattern, const std::string& text) {
        document["pre_tokenizer"] = {
            {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Removed"}, {"invert", false}};
        return Tokenizer::parse(document.dump()).encode(text);
    };
    EXPECT_EQ(pieces("\\s",
                     "a\xC2\x85"
                     "b"),
              (Ids{0, 1}));
    EXPECT_EQ(pieces("[^\\S\\n]",
                     "a\xE3\x80\x80"
                     "b"),
              (Ids{0, 1}));
    EXPECT_EQ(pieces("\\s",
                     "a\xE1\xA0\x8E"
                     "b"),
              (Ids{8}))
        << "U+180E is no space: an unknown character";
    EXPECT_EQ(pieces("\\w",
                     "a\xCC\x81"
                     "b"),
              (Ids{}))
        << "a combining mark is a word character";
    EXPECT_EQ(pieces("^c$", "a\nc\nb"), (Ids{0, 1})) << "^ and $ match at every line";
}

TEST(TokenizerErrors, Text) {
    const auto tokenizer = Tokenizer::load(testdata("trained.json"));
    const std::vector<std::pair<std::string, int>> texts = {
        {"ab\xFF", 2}, {"\xC3", 0}, {"caf\xC3\xA9 \xE2\x82", 6}, {"\xED\xA0\x80", 0}, {"abc\xC0\xAF", 3}};
    for (const auto& bad : texts)
        EXPECT_EQ(test::error_of([&] { tokenizer.encode(bad.first); }),
                  fmt::format("[tokenizer] text is not valid UTF-8 at byte {}", bad.second));
    const int32_t size = tokenizer.size();
    EXPECT_EQ(test::error_of([&] {
                  tokenizer.decode(Ids{0, size});
              }),
              fmt::format("[tokenizer] id {} at place 1 is not in [0, {})", size, size));
    EXPECT_EQ(test::error_of([&] { tokenizer.decode(Ids{-1}); }),
              fmt::format("[tokenizer] id -1 at place 0 is not in [0, {})", size));
}

struct BadFile {
    const char* name;
    std::function<void(json&)> edit;
    const char* message;
};

class TokenizerBadFile : public testing::TestWithParam<BadFile> {};

TEST_P(TokenizerBadFile, IsRefusedWithOneLine) {
    json document = small_json();
    EXPECT_NO_THROW(Tokenizer::parse(document.dump()));
    GetParam().edit(document);
    EXPECT_EQ(test::error_of([&] { Tokenizer::parse(document.dump()); }), GetParam().message);
}

json split_of(const char* pattern) {
    return {
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}

const BadFile kBadFiles[] = {
    {"ModelType", [](json& d) { d["model"]["type"] = "Unigram"; },
     "[tokenizer] model type 'Unigram' is not supported"},
    {"NoVocab", [](json& d) { d["model"].erase("vocab"); },
     "[tokenizer] model.vocab is missing or not an object"},
    {"NoMerges", [](json& d) { d["model"].erase("merges"); },
     "[tokenizer] model.merges is missing or not a list"},
    {"NoModel", [](json& d) { d.erase("model"); }, "[tokenizer] model.vocab is missing or not an object"},
    {"Dropout", [](json& d) { d["model"]["dropout"] = 0.1; },
     "[tokenizer] model.dropout makes ids random and is not supported"},
    {"Prefix", [](json& d) { d["model"]["continuing_subword_prefix"] = "##"; },
     "[tokenizer] model.continuing_subword_prefix is not supported"},
    {"IdTooLarge", [](json& d) { d["model"]["vocab"]["zz"] = 4000000000; },
     "[tokenizer] id 4000000000 of token 'zz' is out of range"},
    {"IdNegative", [](json& d) { d["model"]["vocab"]["zz"] = -1; },
     "[tokenizer] id -1 of token 'zz' is out of range"},
    {"IdNotInteger", [](json& d) { d["model"]["vocab"]["zz"] = 9.5; },
     "[tokenizer] the id of token 'zz' is not an integer"},
    {"IdTwice", [](json& d) { d["model"]["vocab"]["zz"] = 3; },
     "[tokenizer] tokens 'd' and 'zz' have the same id 3"},
    {"MergeUnknown",
     [](json& d) {
         d["model"]["merges"] = {"a b", "b c"};
     },
     "[tokenizer] merge 1: 'bc' is not in model.vocab"},
    {"MergeOfOne", [](json& d) { d["model"]["merges"] = {"ab"}; },
     "[tokenizer] merge 0 'ab' is not two tokens"},
    {"MergeOfThree",
     [](json& d) {
         d["model"]["merges"] = {{"a", "b", "c"}};
     },
     "[tokenizer] merge 0 is not a pair"},
    {"MergeOfNumbers", [](json& d) { d["model"]["merges"] = {1}; }, "[tokenizer] merge 0 is not text"},
    {"AddedIdTaken", [](json& d) { d["added_tokens"] = json::array({added_token(3, "new")}); },
     "[tokenizer] added token 'new' has the id 3 of 'd'"},
    {"AddedIdContradicts", [](json& d) { d["added_tokens"] = json::array({added_token(9, "c")}); },
     "[tokenizer] added token 'c' has id 9 but model.vocab gives it 2"},
    {"AddedTwice",
     [](json& d) {
         d["added_tokens"] = json::array({added_token(9, "x"), added_token(9, "y")});
     },
     "[tokenizer] added token 'y' has the id 9 of another added token"},
    {"AddedIdTooLarge", [](json& d) { d["added_tokens"] = json::array({added_token(1 << 30, "x")}); },
     "[tokenizer] 'id' = 1073741824 of added token 'x' is out of range"},
    {"AddedEmpty", [](json& d) { d["added_tokens"] = json::array({added_token(9, "")}); },
     "[tokenizer] the added token of id 9 is empty"},
    {"Normalizer",
     [](json& d) {
         d["normalizer"] = {{"type", "Precompiled"}};
     },
     "[tokenizer] normalizer 'Precompiled' is not supported"},
    {"PreTokenizer",
     [](json& d) {
         d["pre_tokenizer"] = {{"type", "UnicodeScripts"}};
     },
     "[tokenizer] pre_tokenizer 'UnicodeScripts' is not supported"},
    {"PostProcessor",
     [](json& d) {
         d["post_processor"] = {{"type", "Bell\n"}};
     },
     "[tokenizer] post_processor 'Bell\\x0a' is not supported"},
    {"Decoder",
     [](json& d) {
         d["decoder"] = {{"type", "WordPiece"}};
     },
     "[tokenizer] decoder 'WordPiece' is not supported"},
    {"TemplateId",
     [](json& d) {
         d["post_processor"] = {{"type", "RobertaProcessing"}, {"sep", {"a", 0}}, {"cls", {"z", 99}}};
     },
     "[tokenizer] post_processor id 99 of 'cls' is not in [0, 9)"},
    {"PatternBroken", [](json& d) { d["pre_tokenizer"] = split_of("(a"); },
     "[tokenizer] pattern '(a' does not compile: missing closing parenthesis"},
    {"PatternIntersection", [](json& d) { d["pre_tokenizer"] = split_of("[a-z&&b]"); },
     "[tokenizer] pattern '[a-z&&b]' uses the intersection &&, which is not supported"},
    {"PatternVerb", [](json& d) { d["pre_tokenizer"] = split_of("(*NO_JIT)a"); },
     "[tokenizer] pattern '(*NO_JIT)a' uses the verb (*, which is not supported"},
    {"PatternTooBig", [](json& d) { d["pre_tokenizer"] = split_of("((((a{999}){999}){999}){999})"); },
     "[tokenizer] pattern '((((a{999}){999}){999}){999})' does not compile: regular expression is too large"},
};

INSTANTIATE_TEST_SUITE_P(Files, TokenizerBadFile, testing::ValuesIn(kBadFiles),
                         [](const auto& instance) { return std::string(instance.param.name); });

TEST(TokenizerErrors, Json) {
    EXPECT_EQ(test::error_of([] { Tokenizer::parse("[]"); }), "[tokenizer] the top level is not an object");
    EXPECT_EQ(test::error_of([] { Tokenizer::parse(std::string(1000, '[')); }),
              "[tokenizer] nested deeper than 64");
    for (const char* text :
         {"", "{", "{\"model\": {\"vocab\": {\"a\": 1e999}}}", "{\"a\": \"\\ud800\"}", "\xFF"}) {
        const std::string message = test::error_of([&] { Tokenizer::parse(text); });
        EXPECT_TRUE(message.starts_with("[tokenizer] not JSON at byte ")) << message;
        EXPECT_EQ(message.find('\n'), std::string::npos);
    }
    EXPECT_EQ(
        test::error_of([] { Tokenizer::parse(R"({"model": {"vocab": {"a": 0, "a": 1}, "merges": []}})"); }),
        "[tokenizer] token 'a' appears twice in model.vocab");
    EXPECT_EQ(test::error_of([] { Tokenizer::parse(R"({"model": {"vocab": {}, "vocab": {}}})"); }),
              "[tokenizer] model.vocab appears twice");
    EXPECT_EQ(test::error_of([] { Tokenizer::load("/nonexistent/tokenizer.json"); }),
              "[file] /nonexistent/tokenizer.json: does not exist");
}

// A pattern that backtracks exponentially ends with an error, not never.
TEST(TokenizerErrors, PatternThatBlowsUp) {
    json document = small_json();
    document["pre_tokenizer"] = split_of("(?:a+)+[bh]");
    const auto tokenizer = Tokenizer::parse(document.dump());
    EXPECT_EQ(test::error_of([&] { tokenizer.encode(std::string(64, 'a')); }),
              "[tokenizer] pattern '(?:a+)+[bh]' gives up at byte 0 of a piece: match limit exceeded");
    EXPECT_EQ(tokenizer.encode("aab"), (Ids{0, 8})) << "and the tokenizer still works";
}

}  // namespace
}  // namespace ssm
