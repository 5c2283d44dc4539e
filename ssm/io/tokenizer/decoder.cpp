#include "ssm/io/tokenizer/decoder.h"

#include <algorithm>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

// The bytes that a token of byte characters stands for; false if it has any other character.
bool append_bytes(std::string& out, std::string_view token) {
    const size_t size = out.size();
    for (size_t at = 0; at < token.size();) {
        const Character c = character_at(token, at);
        const int byte = character_to_byte(c.code);
        if (byte < 0) {
            out.resize(size);
            return false;
        }
        out += static_cast<char>(byte);
        at += c.length;
    }
    return true;
}

int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

// The byte of "<0x41>", or -1.
int byte_of_token(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    const int high = hex_digit(token[3]), low = hex_digit(token[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

std::string one_character(const nlohmann::json& step, const char* key, std::string_view what) {
    std::string text = string_field(step, key, what);
    if (text.empty() || character_at(text, 0).length != text.size())
        fail(ErrorCode::bad_file, "tokenizer", "'{}' of {} is not one character", key, what);
    return text;
}

}  // namespace

Decoder::Decoder(const nlohmann::json& object) : joins_with_space_(object.is_null()) {
    for (const auto* step : steps_of(object, "decoders", "decoder")) steps_.push_back(read(*step));
}

Decoder::Step Decoder::read(const nlohmann::json& step) {
    const std::string type = string_field(step, "type", "decoder");
    if (type == "ByteLevel") return ByteLevel{};
    if (type == "ByteFallback") return ByteFallback{};
    if (type == "Fuse") return Fuse{};
    if (type == "Strip") {
        constexpr int64_t most = 1 << 20;
        return Strip{one_character(step, "content", "decoder Strip"),
                     integer_field(step, "start", 0, most, "decoder Strip"),
                     integer_field(step, "stop", 0, most, "decoder Strip")};
    }
    if (type == "Replace")
        return Replace{read_pattern(step, "decoder Replace"),
                       string_field(step, "content", "decoder Replace")};
    if (type == "Metaspace") {
        const auto& scheme = field(step, "prepend_scheme");
        const bool prefix = bool_field(step, "add_prefix_space", true, "decoder Metaspace");
        return Metaspace{one_character(step, "replacement", "decoder Metaspace"),
                         prefix && scheme != "never"};
    }
    fail(ErrorCode::unsupported, "tokenizer", "decoder {} is not supported", shown(type));
}

// Text arrives for the current token.
struct Decoder::Feed {
    const Decoder& decoder;
    size_t step;
    std::string_view text;
    DecoderState& state;

    void hold() const { state.steps[step].buffer.append(text); }
    void operator()(ByteLevel) const { hold(); }
    void operator()(ByteFallback) const { hold(); }
    void operator()(const Replace&) const { hold(); }
    void operator()(Fuse) const { decoder.feed(step + 1, text, state); }

    // Up to `start` leading characters go; up to `stop` trailing ones wait in the buffer, since only the end
    // of the token decides about them.
    void operator()(const Strip& strip) const {
        auto& own = state.steps[step];
        std::string_view rest = text;
        while (own.kept >= 0 && !rest.empty()) {
            const bool drop = own.kept < strip.start && rest.starts_with(strip.content);
            own.kept = drop ? own.kept + 1 : -1;
            if (drop) rest.remove_prefix(strip.content.size());
        }
        own.buffer.append(rest);
        size_t keep = 0;
        const size_t most = static_cast<size_t>(strip.stop) * strip.content.size();
        std::string_view held = own.buffer;
        while (keep < most && held.substr(0, held.size() - keep).ends_with(strip.content))
            keep += strip.content.size();
        held.remove_suffix(keep);
        decoder.feed(step + 1, held, state);
        own.buffer.erase(0, held.size());
    }

    void operator()(const Metaspace& meta) const {
        const bool drop = meta.drops_first && state.steps[step].tokens == 0;
        std::string out;
        for (size_t at = 0; at < text.size();) {
            const size_t length = character_at(text, at).length;
            const std::string_view character = text.substr(at, length);
            if (character != meta.replacement)
                out.append(character);
            else if (!drop)
                out += ' ';
            at += length;
        }
        decoder.feed(step + 1, out, state);
    }
};

// The current token is complete.
struct Decoder::End {
    const Decoder& decoder;
    size_t step;
    DecoderState& state;

    DecoderState::Step& own() const { return state.steps[step]; }

    void operator()(Fuse) const {}

    void operator()(ByteLevel) const {
        if (!append_bytes(own().bytes, own().buffer)) own().bytes.append(own().buffer);
        own().buffer.clear();
        std::string out;
        own().bytes.erase(0, append_lossy(out, own().bytes, true));
        decoder.feed(step + 1, out, state);
    }

    void operator()(ByteFallback) const {
        const std::string text = std::move(own().buffer);
        own().buffer.clear();
        if (const int byte = byte_of_token(text); byte >= 0) {
            own().bytes += static_cast<char>(byte);
            return;
        }
        decoder.finish_bytes(step, state);
        decoder.token(step + 1, text, state);
    }

    void operator()(const Strip&) const {
        own().buffer.clear();
        own().kept = 0;
        decoder.end(step + 1, state);
    }

    void operator()(const Replace& replace) const {
        const std::string out = replace_all(replace.pattern, own().buffer, replace.by, state.scratch);
        own().buffer.clear();
        decoder.token(step + 1, out, state);
    }

    void operator()(const Metaspace&) const {
        ++own().tokens;
        decoder.end(step + 1, state);
    }
};

// No token follows.
struct Decoder::Finish {
    const Decoder& decoder;
    size_t step;
    DecoderState& state;

    void operator()(Fuse) const { decoder.end(step + 1, state); }
    void operator()(ByteFallback) const { decoder.finish_bytes(step, state); }
    void operator()(const Strip&) const {}
    void operator()(const Replace&) const {}
    void operator()(const Metaspace&) const {}
    void operator()(ByteLevel) const {
        std::string out;
        append_lossy(out, state.steps[step].bytes, false);
        decoder.token(step + 1, out, state);
    }
};

// A run of byte tokens is text if it is valid UTF-8 as a whole; else every byte is a U+FFFD.
void Decoder::finish_bytes(size_t step, DecoderState& state) const {
    const std::string bytes = std::move(state.steps[step].bytes);
    state.steps[step].bytes.clear();
    if (bytes.empty()) return;
    if (first_invalid_utf8(bytes) == std::string_view::npos) return token(step + 1, bytes, state);
    for (size_t i = 0; i < bytes.size(); ++i) token(step + 1, "\xEF\xBF\xBD", state);
}

void Decoder::feed(size_t step, std::string_view text, DecoderState& state) const {
    if (text.empty()) return;
    if (step == steps_.size())
        state.out.append(text);
    else
        std::visit(Feed{*this, step, text, state}, steps_[step]);
}

void Decoder::end(size_t step, DecoderState& state) const {
    if (step < steps_.size()) std::visit(End{*this, step, state}, steps_[step]);
}

void Decoder::token(size_t step, std::string_view text, DecoderState& state) const {
    feed(step, text, state);
    end(step, state);
}

void Decoder::begin(DecoderState& state) const {
    state.steps.assign(steps_.size(), {});
    state.any = false;
    state.out.clear();
}

void Decoder::push(std::string_view text, DecoderState& state) const {
    if (joins_with_space_ && state.any) state.out += ' ';
    state.any = true;
    token(0, text, state);
}

void Decoder::finish(DecoderState& state) const {
    for (size_t step = 0; step < steps_.size(); ++step) std::visit(Finish{*this, step, state}, steps_[step]);
}

}  // namespace ssm::tokenizer
