#include "ssm/io/tokenizer/bpe_trainer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/tokenizer.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

std::string read_text(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

// testdata/corpus.txt, cut at its separators.
std::vector<std::string> corpus() {
    const std::string text = read_text(test::source_dir() / "ssm/io/tokenizer/testdata/corpus.txt");
    const std::string separator = "\n<|endoftext|>\n";
    std::vector<std::string> documents;
    for (size_t at = 0; at < text.size();) {
        const size_t end = text.find(separator, at);
        documents.push_back(text.substr(at, end - at));
        at = end == std::string::npos ? text.size() : end + separator.size();
    }
    return documents;
}

std::string train(const std::vector<std::string>& documents, const BpeTrainerOptions& options) {
    return train_bpe(std::vector<std::string_view>(documents.begin(), documents.end()), options);
}

// Merges of words of single-byte symbols by recounting every pair before each merge.
std::vector<std::string> reference_merges(std::map<std::string, int64_t> words, int wanted) {
    std::vector<std::pair<std::vector<std::string>, int64_t>> table;
    for (const auto& [word, count] : words) {
        table.push_back({{}, count});
        for (const char c : word) table.back().first.push_back(std::string(1, c));
    }
    std::map<std::string, int> order;  // ids: printable characters by code, then symbols by creation
    for (int c = 33; c < 127; ++c) order[std::string(1, static_cast<char>(c))] = c;
    std::vector<std::string> merges;
    while (static_cast<int>(merges.size()) < wanted) {
        std::map<std::pair<int, int>, std::tuple<int64_t, std::string, std::string>> counts;
        for (const auto& [symbols, count] : table)
            for (size_t i = 0; i + 1 < symbols.size(); ++i) {
                auto& entry = counts[{order.at(symbols[i]), order.at(symbols[i + 1])}];
                entry = {std::get<0>(entry) + count, symbols[i], symbols[i + 1]};
            }
        const auto best = std::ranges::max_element(counts, [](const auto& a, const auto& b) {
            return std::get<0>(a.second) < std::get<0>(b.second);
        });
        if (best == counts.end()) break;
        const auto [count, left, right] = best->second;
        merges.push_back(fmt::format("{} {}", left, right));
        order.emplace(fmt::format("{}{}", left, right), 1000 + static_cast<int>(merges.size()));
        for (auto& [symbols, n] : table)
            for (size_t i = 0; i + 1 < symbols.size(); ++i)
                if (symbols[i] == left && symbols[i + 1] == right) {
                    symbols[i] += right;
                    symbols.erase(symbols.begin() + static_cast<int64_t>(i) + 1);
                }
    }
    return merges;
}

TEST(BpeTrainer, MatchesReference) {
    // Words with repeats (aaaa), ties, and one string reached by two ways.
    const std::vector<std::string> words = {"aaaa", "aaaaaaa", "banana", "bandana", "abab", "babab", "cab",
                                            "aab",  "baa",     "abcabc", "cbcbcb",  "zz",   "z"};
    std::map<std::string, int64_t> counts;
    std::vector<std::string> documents;
    for (size_t i = 0; i < words.size(); ++i)
        for (size_t repeat = 0; repeat <= i % 4; ++repeat) {
            documents.push_back(words[i]);
            ++counts[words[i]];
        }
    for (const int merges : {0, 1, 2, 5, 10, 100}) {
        BpeTrainerOptions options;
        options.vocab_size = 256 + merges;
        options.min_frequency = 1;
        const auto json = nlohmann::json::parse(train(documents, options));
        const auto actual = json["model"]["merges"].get<std::vector<std::string>>();
        auto expected = reference_merges(counts, 1000);
        expected.resize(std::min(expected.size(), actual.size()));
        EXPECT_EQ(actual, expected);
        if (merges <= 10) {
            EXPECT_EQ(json["model"]["vocab"].size(), static_cast<size_t>(256 + merges));
        }
    }
}

TEST(BpeTrainer, WritesTheCommittedFile) {
    BpeTrainerOptions options;
    options.vocab_size = 400;
    options.special_tokens = {"<|endoftext|>", "<|pad|>"};
    const std::string expected = read_text(test::source_dir() / "ssm/io/tokenizer/testdata/trained.json");
    auto documents = corpus();
    ASSERT_GT(documents.size(), 2u);
    for (const int threads : {1, 2, 3}) {
        options.threads = threads;
        EXPECT_EQ(train(documents, options), expected);
        std::ranges::reverse(documents);
    }
}

TEST(BpeTrainer, WhatItWritesRoundTrips) {
    BpeTrainerOptions options;
    options.vocab_size = 300;
    options.special_tokens = {"<|endoftext|>"};
    for (const char* pattern : {"", "\\p{L}+|\\p{N}|[^\\p{L}\\p{N}]+"}) {
        options.pattern = pattern;
        const auto tokenizer = Tokenizer::parse(train(corpus(), options));
        EXPECT_EQ(tokenizer.id_of("<|endoftext|>"), 0);
        for (const std::string& text : corpus()) {
            const auto ids = tokenizer.encode(text);
            EXPECT_EQ(tokenizer.decode(ids), text);
            EXPECT_LT(ids.size(), text.size());
        }
    }
}

TEST(BpeTrainer, StopsAtTheMinimumFrequency) {
    BpeTrainerOptions options;
    options.min_frequency = 3;
    const auto json = nlohmann::json::parse(train({"xy xy xy", "zw zw"}, options));
    EXPECT_EQ(json["model"]["merges"].size(), 1u) << "xy at three, ' x' at two, zw at two";
}

TEST(BpeTrainerErrors, Options) {
    const auto message = [](const std::function<void(BpeTrainerOptions&)>& edit) {
        BpeTrainerOptions options;
        edit(options);
        return test::error_of([&] { BpeTrainer trainer(options); });
    };
    EXPECT_EQ(message([](auto& o) {
                  o.vocab_size = 256;
                  o.special_tokens = {"<e>"};
              }),
              "[tokenizer] a vocabulary of 256 is too small: 256 bytes and 1 special tokens need 257");
    EXPECT_EQ(message([](auto& o) { o.min_frequency = 0; }),
              "[tokenizer] the minimum frequency must be at least 1 but is 0");
    EXPECT_EQ(message([](auto& o) { o.special_tokens = {""}; }), "[tokenizer] a special token is empty");
    EXPECT_EQ(message([](auto& o) { o.pattern.push_back('('); }),
              "[tokenizer] pattern '(' does not compile: missing closing parenthesis");
    EXPECT_EQ(test::error_of([] {
                  train({"fine", "bad \xFF"}, {});
              }),
              "[tokenizer] document 1 is not valid UTF-8 at byte 4");
}

}  // namespace
}  // namespace ssm
