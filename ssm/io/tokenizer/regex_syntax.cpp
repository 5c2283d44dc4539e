// From Oniguruma's syntax to PCRE2's.
#include <array>
#include <cctype>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/regex.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

namespace {

// White_Space and its complement, and Oniguruma's word characters, as the inside of a class.
constexpr std::string_view kSpace =
    "\\t-\\r\\x20\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
constexpr std::string_view kNotSpace =
    "\\x00-\\x08\\x0E-\\x1F\\x21-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}\\x{1681}-\\x{1FFF}\\x{200B}-\\x{"
    "2027}"
    "\\x{202A}-\\x{202E}\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}\\x{3001}-\\x{10FFFF}";
constexpr std::string_view kWord =
    "\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}\\p{L}\\p{Nl}\\p{M}\\p{Nd}\\p{Pc}\\x{24B6}-\\x{24E9}\\x{1F130}-\\x{"
    "1F149}\\x{1F150}-\\x{1F169}"
    "\\x{1F170}-\\x{1F189}";

class Translator {
public:
    explicit Translator(std::string_view pattern) : in_(pattern) {}

    std::string run() {
        if (first_invalid_utf8(in_) != std::string_view::npos) unsupported("invalid UTF-8");
        while (at_ < in_.size()) {
            const char c = in_[at_];
            if (c == '\\')
                escape(false);
            else if (c == '[')
                character_class();
            else if (c == '(')
                group();
            else if (c == '{')
                interval();
            else
                take(1);
        }
        return std::move(out_);
    }

private:
    [[noreturn]] void unsupported(std::string_view what) const {
        fail(ErrorCode::unsupported, "tokenizer", "pattern {} uses {}, which is not supported", shown(in_),
             what);
    }

    char peek(size_t ahead) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
    bool starts(std::string_view what) const { return in_.substr(at_).starts_with(what); }

    void take(size_t n) {
        out_.append(in_.substr(at_, n));
        at_ += n;
    }

    void replace(size_t n, std::string_view by) {
        out_.append(by);
        at_ += n;
    }

    void set(std::string_view inside, bool negated, bool in_class) {
        if (in_class) return replace(2, inside);
        out_.append(negated ? "[^" : "[").append(inside);
        replace(2, "]");
    }

    // \x61, \x{1F600}, \u00E9
    void code_point(char kind) {
        size_t begin = at_ + 2, digits = 0;
        const bool braces = kind == 'x' && peek(2) == '{';
        if (braces) ++begin;
        const size_t most = braces ? 8 : kind == 'x' ? 2 : 4;
        while (digits < most && begin + digits < in_.size() &&
               std::isxdigit(static_cast<unsigned char>(in_[begin + digits])))
            ++digits;
        const bool closed = !braces || (begin + digits < in_.size() && in_[begin + digits] == '}');
        if (digits == 0 || !closed || (kind == 'u' && digits != 4)) unsupported("a malformed escape");
        out_.append("\\x{").append(in_.substr(begin, digits)).append("}");
        at_ = begin + digits + (braces ? 1 : 0);
    }

    void property() {
        const size_t close = in_.find('}', at_);
        if (peek(2) != '{' || close == std::string_view::npos || close - at_ > 40)
            unsupported("a property without braces");
        take(close + 1 - at_);
    }

    void escape(bool in_class) {
        const char c = peek(1);
        switch (c) {
            case 's': return set(kSpace, false, in_class);
            case 'S': return in_class ? set(kNotSpace, false, true) : set(kSpace, true, false);
            case 'w': return set(kWord, false, in_class);
            case 'W': return in_class ? unsupported("\\W inside a class") : set(kWord, true, false);
            case 'd': return replace(2, "\\p{Nd}");
            case 'D': return replace(2, "\\P{Nd}");
            case 'v': return replace(2, "\\x0B");
            case 'p':
            case 'P': return property();
            case 'x':
            case 'u': return code_point(c);
            case 'r':
            case 'n':
            case 't':
            case 'f': return take(2);
            case 'A':
            case 'z':
                if (!in_class) return take(2);
                break;
            default:
                if (c != '\0' && !std::isalnum(static_cast<unsigned char>(c))) {
                    out_ += '\\';
                    ++at_;
                    return take(character_at(in_, at_).length);
                }
        }
        unsupported(c == '\0' ? std::string("a final backslash") : fmt::format("the escape \\{}", c));
    }

    void character_class() {
        take(1);
        if (peek(0) == '^') take(1);
        if (peek(0) == ']') unsupported("a class that begins with ]");
        while (at_ < in_.size() && in_[at_] != ']') {
            if (in_[at_] == '[') unsupported("a class inside a class");
            if (starts("&&")) unsupported("the intersection &&");
            if (in_[at_] == '\\')
                escape(true);
            else
                take(1);
        }
        if (at_ == in_.size()) unsupported("a class without end");
        take(1);
    }

    void group() {
        if (starts("(*")) unsupported("the verb (*");
        if (!starts("(?")) return take(1);
        for (const std::string_view known : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"})
            if (starts(known)) return take(known.size());
        // In Oniguruma a bare (?i) also covers the alternatives after it: spell its reach.
        if (starts("(?i:")) return take(4);
        if (starts("(?-i:")) return take(5);
        if (starts("(?i)") && at_ == 0) return take(4);
        unsupported(fmt::format("the group {}", shown(in_.substr(at_, 4))));
    }

    // {n,m}: in Oniguruma a + after it repeats it, in PCRE2 it makes it possessive.
    void interval() {
        const size_t close = in_.find('}', at_);
        if (close == std::string_view::npos || !std::isdigit(static_cast<unsigned char>(peek(1))))
            unsupported("a { that is not an interval like {1,3}");
        take(close + 1 - at_);
        if (peek(0) == '+') unsupported("+ after an interval");
    }

    std::string_view in_;
    size_t at_ = 0;
    std::string out_;
};

}  // namespace

std::string translate_pattern(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace ssm::tokenizer
