// The normalizer of a tokenizer.json: rewrites text before it is split.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "ssm/io/tokenizer/document.h"
#include "ssm/io/tokenizer/regex.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

// {"String": "a"} or {"Regex": "a+"}: what Replace and Split look for. Empty ones are refused.
using Pattern = std::variant<std::string, Regex>;
Pattern read_pattern(const nlohmann::json& object, std::string_view what);

// f(begin, end) for every occurrence from left to right.
template <class F>
void for_each_match(const Pattern& pattern, std::string_view text, RegexScratch& scratch, F&& f) {
    if (const auto* regex = std::get_if<Regex>(&pattern)) return regex->for_each_match(text, scratch, f);
    const auto& literal = std::get<std::string>(pattern);
    for (size_t at = 0; (at = text.find(literal, at)) != std::string_view::npos; at += literal.size())
        f(at, at + literal.size());
}

std::string replace_all(const Pattern& pattern, std::string_view text, std::string_view by,
                        RegexScratch& scratch);

class Normalizer {
public:
    explicit Normalizer(const nlohmann::json& object);
    bool empty() const { return steps_.empty(); }
    std::string apply(std::string_view text, RegexScratch& scratch) const;

private:
    struct Prepend {
        std::string text;
    };
    struct Replace {
        Pattern pattern;
        std::string by;
    };
    struct Strip {
        bool left, right;
    };
    struct Lowercase {};
    struct StripAccents {};
    struct ByteLevel {};
    using Step = std::variant<Form, Prepend, Replace, Strip, Lowercase, StripAccents, ByteLevel>;
    static Step read(const nlohmann::json& step);
    struct Apply;

    std::vector<Step> steps_;
};

}  // namespace ssm::tokenizer
