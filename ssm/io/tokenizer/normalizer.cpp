#include "ssm/io/tokenizer/normalizer.h"

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

std::string strip(std::string_view text, bool left, bool right) {
    size_t begin = text.size(), end = 0;  // of what is not white space
    for (size_t at = 0; at < text.size();) {
        const Character c = character_at(text, at);
        if (!is_space(c.code)) {
            begin = std::min(begin, at);
            end = at + c.length;
        }
        at += c.length;
    }
    if (!left) begin = 0;
    if (!right) end = text.size();
    return std::string(begin < end ? text.substr(begin, end - begin) : std::string_view{});
}

std::string without_marks(std::string_view text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Character c = character_at(text, at);
        if (!is_mark(c.code)) out.append(text.substr(at, c.length));
        at += c.length;
    }
    return out;
}

}  // namespace

Pattern read_pattern(const nlohmann::json& object, std::string_view what) {
    const auto& pattern = field(object, "pattern");
    const bool is_regex = !field(pattern, "Regex").is_null();
    std::string text =
        string_field(pattern, is_regex ? "Regex" : "String", fmt::format("pattern of {}", what));
    if (text.empty())
        fail(ErrorCode::unsupported, "tokenizer", "an empty pattern of {} is not supported", what);
    if (is_regex) return Regex(text);
    return text;
}

std::string replace_all(const Pattern& pattern, std::string_view text, std::string_view by,
                        RegexScratch& scratch) {
    std::string out;
    size_t done = 0;
    for_each_match(pattern, text, scratch, [&](size_t begin, size_t end) {
        out.append(text.substr(done, begin - done)).append(by);
        done = end;
    });
    return out.append(text.substr(done));
}

Normalizer::Normalizer(const nlohmann::json& object) {
    for (const auto* step : steps_of(object, "normalizers", "normalizer")) steps_.push_back(read(*step));
}

Normalizer::Step Normalizer::read(const nlohmann::json& step) {
    const std::string type = string_field(step, "type", "normalizer");
    if (type == "NFC") return Form::nfc;
    if (type == "NFD") return Form::nfd;
    if (type == "NFKC") return Form::nfkc;
    if (type == "NFKD") return Form::nfkd;
    if (type == "Lowercase") return Lowercase{};
    if (type == "StripAccents") return StripAccents{};
    if (type == "ByteLevel") return ByteLevel{};
    if (type == "Prepend") return Prepend{string_field(step, "prepend", "normalizer Prepend")};
    if (type == "Replace")
        return Replace{read_pattern(step, "normalizer Replace"),
                       string_field(step, "content", "normalizer Replace")};
    if (type == "Strip")
        return Strip{bool_field(step, "strip_left", false, "normalizer Strip"),
                     bool_field(step, "strip_right", false, "normalizer Strip")};
    fail(ErrorCode::unsupported, "tokenizer", "normalizer {} is not supported", shown(type));
}

struct Normalizer::Apply {
    std::string_view text;
    RegexScratch& scratch;

    std::string operator()(Form form) const { return normalize(text, form); }
    std::string operator()(const Prepend& p) const { return text.empty() ? "" : p.text + std::string(text); }
    std::string operator()(const Replace& r) const { return replace_all(r.pattern, text, r.by, scratch); }
    std::string operator()(const Strip& s) const { return strip(text, s.left, s.right); }
    std::string operator()(Lowercase) const { return lowercase(text); }
    std::string operator()(StripAccents) const { return without_marks(text); }
    std::string operator()(ByteLevel) const { return to_byte_characters(text); }
};

std::string Normalizer::apply(std::string_view text, RegexScratch& scratch) const {
    std::string out(text);
    for (const Step& step : steps_) out = std::visit(Apply{out, scratch}, step);
    return out;
}

}  // namespace ssm::tokenizer
