// Split patterns: Oniguruma's syntax, as in tokenizer.json, run by PCRE2 (JIT where the system allows it).
//
// The pattern is translated, since the two differ quietly: \s and \w become the Unicode classes that
// Oniguruma means, ^ and $ match at every line. What cannot be translated (class intersections, POSIX
// classes, verbs, inline flags but `i`, ...) is an error that names it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace ssm::tokenizer {

struct Span {
    size_t begin = 0, end = 0;
};

// What a search needs for itself; one per thread.
class RegexScratch {
public:
    RegexScratch();
    ~RegexScratch();
    RegexScratch(const RegexScratch&) = delete;
    RegexScratch& operator=(const RegexScratch&) = delete;

private:
    friend class Regex;
    void* match_data_ = nullptr;
    void* match_context_ = nullptr;
    void* jit_stack_ = nullptr;  // made when the machine stack is too small
};

class Regex {
public:
    explicit Regex(std::string_view pattern);
    ~Regex();
    Regex(Regex&& other) noexcept;
    Regex& operator=(Regex&&) = delete;

    // The first match at or after `from`; text must be valid UTF-8. Past the match limit or 10 s: an error.
    bool find(std::string_view text, size_t from, RegexScratch& scratch, Span& match) const;

    // f(begin, end) for every match from left to right. An empty match right after a match is skipped.
    template <class F>
    void for_each_match(std::string_view text, RegexScratch& scratch, F&& f) const {
        size_t from = 0, last_end = std::string_view::npos;
        Span match;
        while (from <= text.size() && find(text, from, scratch, match)) {
            from = match.end;
            if (match.begin == match.end && match.end == last_end) {
                from = next_character(text, match.end);
                continue;
            }
            last_end = match.end;
            f(match.begin, match.end);
        }
    }

private:
    static size_t next_character(std::string_view text, size_t at);
    [[noreturn]] void fail_match(int code, size_t at) const;

    void* code_ = nullptr;
    std::string pattern_;
};

// The PCRE2 pattern of an Oniguruma pattern.
std::string translate_pattern(std::string_view pattern);

}  // namespace ssm::tokenizer
