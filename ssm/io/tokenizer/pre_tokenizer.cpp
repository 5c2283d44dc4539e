#include "ssm/io/tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

PreTokenizer::PreTokenizer(const nlohmann::json& object) {
    for (const auto* step : steps_of(object, "pretokenizers", "pre_tokenizer")) read(*step);
}

PreTokenizer::Behavior PreTokenizer::read_behavior(const nlohmann::json& step, std::string_view what) {
    const std::string name = string_field(step, "behavior", what);
    if (name == "Removed") return Behavior::removed;
    if (name == "Isolated") return Behavior::isolated;
    if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
    if (name == "MergedWithNext") return Behavior::merged_with_next;
    if (name == "Contiguous") return Behavior::contiguous;
    fail(ErrorCode::unsupported, "tokenizer", "behavior {} of {} is not supported", shown(name), what);
}

PreTokenizer::Split PreTokenizer::read_split(const nlohmann::json& step) {
    constexpr std::string_view what = "pre_tokenizer Split";
    return {read_pattern(step, what), read_behavior(step, what), bool_field(step, "invert", false, what)};
}

PreTokenizer::Metaspace PreTokenizer::read_metaspace(const nlohmann::json& step) {
    constexpr std::string_view what = "pre_tokenizer Metaspace";
    Metaspace out;
    out.replacement = string_field(step, "replacement", what);
    if (out.replacement.empty() || character_at(out.replacement, 0).length != out.replacement.size())
        fail(ErrorCode::bad_file, "tokenizer", "the replacement of {} is not one character", what);
    const bool given = !field(step, "prepend_scheme").is_null();
    const std::string scheme = given ? string_field(step, "prepend_scheme", what) : "always";
    if (scheme == "always")
        out.prepend = Metaspace::Prepend::always;
    else if (scheme == "first")
        out.prepend = Metaspace::Prepend::first;
    else if (scheme == "never")
        out.prepend = Metaspace::Prepend::never;
    else
        fail(ErrorCode::unsupported, "tokenizer", "prepend_scheme {} is not supported", shown(scheme));
    if (!bool_field(step, "add_prefix_space", true, what)) {
        if (given && scheme != "never")
            fail(ErrorCode::bad_file, "tokenizer", "add_prefix_space contradicts prepend_scheme of {}", what);
        out.prepend = Metaspace::Prepend::never;
    }
    if (bool_field(step, "split", true, what))
        out.split.push_back({Pattern(out.replacement), Behavior::merged_with_next});
    return out;
}

void PreTokenizer::read(const nlohmann::json& step) {
    const std::string type = string_field(step, "type", "pre_tokenizer");
    const auto add = [&](auto delimiter, Behavior behavior, bool invert = false) {
        steps_.push_back(Split{std::move(delimiter), behavior, invert});
    };
    if (type == "ByteLevel") {
        ByteLevel out{bool_field(step, "add_prefix_space", true, "pre_tokenizer ByteLevel"), {}};
        if (bool_field(step, "use_regex", true, "pre_tokenizer ByteLevel"))
            out.split.push_back({Pattern(Regex(kGpt2Pattern)), Behavior::isolated});
        steps_.push_back(std::move(out));
    } else if (type == "Split") {
        steps_.push_back(read_split(step));
    } else if (type == "Metaspace") {
        steps_.push_back(read_metaspace(step));
    } else if (type == "Digits") {
        const bool each = bool_field(step, "individual_digits", false, "pre_tokenizer Digits");
        add(CharacterClass::numeric, each ? Behavior::isolated : Behavior::contiguous);
    } else if (type == "Punctuation") {
        const bool given = !field(step, "behavior").is_null();
        add(CharacterClass::punctuation,
            given ? read_behavior(step, "pre_tokenizer Punctuation") : Behavior::isolated);
    } else if (type == "WhitespaceSplit") {
        add(CharacterClass::space, Behavior::removed);
    } else if (type == "Whitespace") {
        // The library uses another engine here, with Unicode's own word characters.
        const std::string word =
            "\\p{L}\\p{Nl}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}\\x{24B6}-\\x{24E9}\\x{1F130}-\\x{1F149}"
            "\\x{1F150}-\\x{1F169}\\x{1F170}-\\x{1F189}";
        add(Pattern(Regex(fmt::format("[{}]+|[^{}\\s]+", word, word))), Behavior::removed, true);
    } else if (type == "BertPreTokenizer") {
        add(CharacterClass::space, Behavior::removed);
        add(CharacterClass::punctuation, Behavior::isolated);
    } else {
        fail(ErrorCode::unsupported, "tokenizer", "pre_tokenizer {} is not supported", shown(type));
    }
}

// f(piece) for matches and for the text between them.
template <class F>
void PreTokenizer::find_pieces(const Split& split, std::string_view text, RegexScratch& scratch, F&& f) {
    size_t done = 0;
    const auto match = [&](size_t begin, size_t end) {
        if (done != begin) f(Piece{done, begin, split.invert});
        f(Piece{begin, end, !split.invert});
        done = end;
    };
    if (const auto* pattern = std::get_if<Pattern>(&split.delimiter)) {
        for_each_match(*pattern, text, scratch, match);
    } else {
        const auto wanted = std::get<CharacterClass>(split.delimiter);
        for (size_t at = 0; at < text.size();) {
            const Character c = character_at(text, at);
            const bool found = wanted == CharacterClass::numeric       ? is_numeric(c.code)
                               : wanted == CharacterClass::punctuation ? is_punctuation(c.code)
                                                                       : is_space(c.code);
            if (found) match(at, at + c.length);
            at += c.length;
        }
    }
    if (done != text.size()) f(Piece{done, text.size(), split.invert});
}

std::vector<PreTokenizer::Piece> PreTokenizer::merge_pieces(Behavior behavior,
                                                            const std::vector<Piece>& pieces) {
    std::vector<Piece> out;
    const auto merge = [&](const Piece& piece, bool joins) {
        if (joins && !out.empty()) {
            out.back().begin = std::min(out.back().begin, piece.begin);
            out.back().end = std::max(out.back().end, piece.end);
        } else {
            out.push_back(piece);
        }
    };
    bool previous = false;
    const auto visit = [&](const Piece& piece) {
        merge(piece,
              behavior == Behavior::contiguous ? piece.matched == previous : piece.matched && !previous);
        previous = piece.matched;
    };
    if (behavior == Behavior::merged_with_next) {
        std::for_each(pieces.rbegin(), pieces.rend(), visit);
        std::reverse(out.begin(), out.end());
    } else {
        std::for_each(pieces.begin(), pieces.end(), visit);
    }
    return out;
}

template <class F>
void PreTokenizer::for_each_piece(const Split& split, std::string_view text, RegexScratch& scratch, F&& f) {
    if (split.behavior == Behavior::isolated || split.behavior == Behavior::removed) {
        const bool removes = split.behavior == Behavior::removed;
        find_pieces(split, text, scratch, [&](const Piece& piece) {
            if (piece.begin < piece.end && !(removes && piece.matched)) f(piece);
        });
        return;
    }
    std::vector<Piece> pieces;
    find_pieces(split, text, scratch, [&](const Piece& piece) { pieces.push_back(piece); });
    for (const Piece& piece : merge_pieces(split.behavior, pieces))
        if (piece.begin < piece.end) f(piece);
}

void PreTokenizer::run(std::string_view text, bool at_start, RegexScratch& scratch, const Sink& sink) const {
    run_step(0, text, at_start, scratch, sink);
}

void PreTokenizer::run_step(size_t step, std::string_view text, bool at_start, RegexScratch& scratch,
                            const Sink& sink) const {
    if (text.empty()) return;
    if (step == steps_.size()) return sink(text, false);
    const auto each = [&](std::string_view whole, const std::vector<Split>& split, auto&& f) {
        if (split.empty()) return f(whole, at_start);
        for_each_piece(split[0], whole, scratch, [&](const Piece& piece) {
            f(whole.substr(piece.begin, piece.end - piece.begin), at_start && piece.begin == 0);
        });
    };
    if (const auto* split = std::get_if<Split>(&steps_[step])) {
        for_each_piece(*split, text, scratch, [&](const Piece& piece) {
            run_step(step + 1, text.substr(piece.begin, piece.end - piece.begin),
                     at_start && piece.begin == 0, scratch, sink);
        });
    } else if (const auto* level = std::get_if<ByteLevel>(&steps_[step])) {
        std::string prefixed;
        if (level->prefix_space && text[0] != ' ') text = prefixed.append(" ").append(text);
        each(text, level->split, [&](std::string_view piece, bool first) {
            if (step + 1 == steps_.size())
                sink(piece, true);
            else
                run_step(step + 1, to_byte_characters(piece), first, scratch, sink);
        });
    } else {
        const auto& meta = std::get<Metaspace>(steps_[step]);
        std::string spaced = replace_all(Pattern(std::string(" ")), text, meta.replacement, scratch);
        const bool wanted = meta.prepend == Metaspace::Prepend::always ||
                            (meta.prepend == Metaspace::Prepend::first && at_start);
        if (wanted && !spaced.starts_with(meta.replacement)) spaced.insert(0, meta.replacement);
        each(spaced, meta.split,
             [&](std::string_view piece, bool first) { run_step(step + 1, piece, first, scratch, sink); });
    }
}

}  // namespace ssm::tokenizer
