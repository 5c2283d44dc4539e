// Generator: limits, end-of-text tokens, stop strings.
#include "ssm/generate/generator.h"

#include <gtest/gtest.h>

#include "tests/support/model_case.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

// Everything pushed piece by piece, and how it ended.
std::string filtered(const std::vector<std::string>& stop, const std::vector<std::string>& pieces,
                     bool& stopped) {
    StopFilter filter(stop);
    std::string shown;
    for (const std::string& piece : pieces) shown += filter.push(piece);
    stopped = filter.stopped();
    return shown + filter.flush();
}

// The text up to the first stop string, by definition.
std::string cut(const std::string& text, const std::vector<std::string>& stop) {
    size_t first = text.size();
    for (const std::string& s : stop) first = std::min(first, std::min(text.find(s), text.size()));
    return text.substr(0, first);
}

// However the text is cut into pieces, what is shown is the text up to the first stop string.
TEST(StopFilter, EveryWayToCutAText) {
    const std::string text = "aabaabab";
    for (const std::vector<std::string>& stop : std::vector<std::vector<std::string>>{{},
                                                                                      {"b"},
                                                                                      {"aab"},
                                                                                      {"abab"},
                                                                                      {"baab", "aba"},
                                                                                      {"bab", "xyz"},
                                                                                      {"abb"},
                                                                                      {"aabaabab"},
                                                                                      {"aabaababa"}}) {
        for (unsigned mask = 0; mask < 1u << (text.size() - 1); ++mask) {
            std::vector<std::string> pieces(1);
            for (size_t i = 0; i < text.size(); ++i) {
                pieces.back() += text[i];
                if ((mask >> i & 1u) != 0) pieces.emplace_back();
            }
            bool stopped = false;
            ASSERT_EQ(filtered(stop, pieces, stopped), cut(text, stop)) << mask;
            ASSERT_EQ(stopped, cut(text, stop) != text);
        }
    }
}

TEST(StopFilter, HoldsBackOnlyWhatMayStillStop) {
    StopFilter filter({"END", ""});  // an empty stop string is none
    EXPECT_EQ(filter.push("the "), "the ");
    EXPECT_EQ(filter.push("EN"), "");
    EXPECT_EQ(filter.push("C"), "ENC");
    EXPECT_EQ(filter.push("xE"), "x");
    EXPECT_EQ(filter.push("EN"), "E");
    EXPECT_FALSE(filter.stopped());
    EXPECT_EQ(filter.push("D and more"), "");
    EXPECT_TRUE(filter.stopped());
    EXPECT_EQ(filter.push("more"), "");
    EXPECT_EQ(filter.flush(), "");
}

// A tokenizer of single bytes a..z, so that ids are letters; id 26 is a special end-of-text token.
Tokenizer letters() {
    nlohmann::json vocab = nlohmann::json::object();
    for (int i = 0; i < 26; ++i) vocab[std::string(1, static_cast<char>('a' + i))] = i;
    vocab["<end>"] = 26;
    const nlohmann::json file = {
        {"version", "1.0"},
        {"added_tokens",
         {{{"id", 26},
           {"content", "<end>"},
           {"special", true},
           {"single_word", false},
           {"lstrip", false},
           {"rstrip", false},
           {"normalized", false}}}},
        {"normalizer", nullptr},
        {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
        {"post_processor", nullptr},
        {"decoder", {{"type", "ByteLevel"}}},
        {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
    return Tokenizer::parse(file.dump());
}

class GeneratorTest : public testing::Test {
protected:
    GeneratorTest()
        : case_({.vocab = 30, .embedding = "backbone.embedding.weight"}, 11), ex_(make_cpu_exec(1)) {}

    Generated run(const Tokenizer* tokenizer, const GenerateOptions& options) {
        Session session(ex_, *case_.model);
        session.consume(std::vector<int32_t>{1, 2, 3});
        Sampler sampler(SamplerOptions{.temperature = 2.0f, .seed = 9});
        shown_.clear();
        Generated out = generate(session, sampler, tokenizer, *case_.model, options,
                                 [&](const std::string& text) { shown_ += text; });
        // All generated tokens were consumed: the session may be saved and continued.
        EXPECT_EQ(session.history().size(), 3 + out.ids.size());
        EXPECT_EQ(shown_, out.text);
        return out;
    }

    ModelCase case_;
    Exec ex_;
    std::string shown_;
};

TEST_F(GeneratorTest, StopsAtTheLimit) {
    const Generated out = run(nullptr, {.max_tokens = 60, .ignore_eos = true});
    EXPECT_EQ(out.ids.size(), 60u);
    EXPECT_EQ(out.reason, Generated::Reason::length);
    EXPECT_EQ(out.text, "");
    // Without a tokenizer every id of the model is possible, the padded ones too.
    EXPECT_GT(*std::ranges::max_element(out.ids), 26);
    EXPECT_TRUE(run(nullptr, {.max_tokens = 0}).ids.empty());
}

TEST_F(GeneratorTest, TextIsThatOfTheIds) {
    const Tokenizer tokenizer = letters();
    const Generated out = run(&tokenizer, {.max_tokens = 60, .ignore_eos = true});
    std::string expected;
    for (const int32_t id : out.ids) {
        ASSERT_LE(id, 26);  // never an id that the tokenizer lacks
        if (id < 26) expected += static_cast<char>('a' + id);
    }
    EXPECT_EQ(out.text, expected);
}

// The model's end-of-text id is 0 (the original layout's): the letter a.
TEST_F(GeneratorTest, StopsAtEndOfText) {
    const Tokenizer tokenizer = letters();
    const Generated whole = run(&tokenizer, {.max_tokens = 200, .ignore_eos = true});
    const auto end = std::ranges::find(whole.ids, 0) - whole.ids.begin();
    ASSERT_LT(end, 199);
    const Generated out = run(&tokenizer, {.max_tokens = 200});
    EXPECT_EQ(out.reason, Generated::Reason::eos);
    EXPECT_EQ(out.ids, std::vector<int32_t>(whole.ids.begin(), whole.ids.begin() + end + 1));
}

TEST_F(GeneratorTest, StopsAtAString) {
    const Tokenizer tokenizer = letters();
    const Generated whole = run(&tokenizer, {.max_tokens = 60, .ignore_eos = true});
    const std::string stop = whole.text.substr(20, 3);
    const Generated out = run(&tokenizer, {.max_tokens = 60, .stop = {"!", stop}, .ignore_eos = true});
    EXPECT_EQ(out.reason, Generated::Reason::stop);
    EXPECT_EQ(out.text, whole.text.substr(0, whole.text.find(stop)));
    EXPECT_LT(out.ids.size(), whole.ids.size());
}

TEST_F(GeneratorTest, Errors) {
    EXPECT_EQ(error_of([&] { run(nullptr, {.stop = {"x"}}); }), "[generate] stop strings need a tokenizer");
    Session session(ex_, *case_.model);
    Sampler sampler(SamplerOptions{});
    EXPECT_EQ(error_of([&] { generate(session, sampler, nullptr, *case_.model, {}, {}); }),
              "[generate] the prompt is empty: there is no token to continue from");
}

}  // namespace
}  // namespace ssm::test
