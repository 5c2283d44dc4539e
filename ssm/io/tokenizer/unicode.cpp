#include "ssm/io/tokenizer/unicode.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Length by the lead byte, and the range of the second byte (Unicode table 3-7).
struct Lead {
    uint8_t length, low, high;
};

Lead lead_of(uint8_t byte) {
    if (byte < 0x80) return {1, 0, 0};
    if (byte < 0xC2) return {0, 0, 0};
    if (byte < 0xE0) return {2, 0x80, 0xBF};
    if (byte == 0xE0) return {3, 0xA0, 0xBF};
    if (byte == 0xED) return {3, 0x80, 0x9F};
    if (byte < 0xF0) return {3, 0x80, 0xBF};
    if (byte == 0xF0) return {4, 0x90, 0xBF};
    if (byte < 0xF4) return {4, 0x80, 0xBF};
    if (byte == 0xF4) return {4, 0x80, 0x8F};
    return {0, 0, 0};
}

struct ByteTable {
    std::array<std::array<char, 2>, 256> text;
    std::array<uint8_t, 256> length;
    std::array<int16_t, 324> byte;  // of characters below U+0144

    ByteTable() {
        byte.fill(-1);
        char32_t next = 256;
        for (int b = 0; b < 256; ++b) {
            const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
            const char32_t code = printable ? static_cast<char32_t>(b) : next++;
            std::string utf8;
            append_utf8(utf8, code);
            std::copy(utf8.begin(), utf8.end(), text[static_cast<size_t>(b)].begin());
            length[static_cast<size_t>(b)] = static_cast<uint8_t>(utf8.size());
            byte[code] = static_cast<int16_t>(b);
        }
    }
};

const ByteTable& byte_table() {
    static const ByteTable table;
    return table;
}

utf8proc_category_t category(char32_t code) { return utf8proc_category(static_cast<utf8proc_int32_t>(code)); }

utf8proc_option_t options_of(Form form) {
    switch (form) {
        case Form::nfc: return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        case Form::nfd: return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
        case Form::nfkc:
            return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
        case Form::nfkd: break;
    }
    return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
}

bool is_ascii(char byte) { return static_cast<uint8_t>(byte) < 0x80; }

// Appends the normal form of `text`, which no neighbouring text can change.
void append_form(std::string& out, std::string_view text, utf8proc_option_t options,
                 std::vector<utf8proc_int32_t>& codes) {
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const auto size = static_cast<utf8proc_ssize_t>(text.size());
    // utf8proc_reencode writes UTF-8 and a final zero over the code points: one to spare.
    auto count =
        utf8proc_decompose(bytes, size, codes.data(), static_cast<utf8proc_ssize_t>(codes.size()), options);
    if (count >= static_cast<utf8proc_ssize_t>(codes.size())) {
        codes.resize(static_cast<size_t>(count) + 1);
        count = utf8proc_decompose(bytes, size, codes.data(), count + 1, options);
    }
    if (count < 0) fail(ErrorCode::invalid_argument, "tokenizer", "{}", utf8proc_errmsg(count));
    const auto length = utf8proc_reencode(codes.data(), count, options);
    if (length < 0) fail(ErrorCode::invalid_argument, "tokenizer", "{}", utf8proc_errmsg(length));
    out.append(reinterpret_cast<const char*>(codes.data()), static_cast<size_t>(length));
}

}  // namespace

Character character_at(std::string_view text, size_t at) {
    const auto first = static_cast<uint8_t>(text[at]);
    const Lead lead = lead_of(first);
    if (lead.length == 0) return {0, 1, false, false};
    if (lead.length == 1) return {first, 1, true, false};
    char32_t code = first & (0x7Fu >> lead.length);
    for (size_t i = 1; i < lead.length; ++i) {
        if (at + i >= text.size()) return {0, i, false, true};
        const auto byte = static_cast<uint8_t>(text[at + i]);
        const uint8_t low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xBF;
        if (byte < low || byte > high) return {0, i, false, false};
        code = code << 6 | (byte & 0x3Fu);
    }
    return {code, lead.length, true, false};
}

size_t first_invalid_utf8(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        if (is_ascii(text[at])) {
            ++at;
            continue;
        }
        const Character c = character_at(text, at);
        if (!c.valid) return at;
        at += c.length;
    }
    return std::string_view::npos;
}

void append_utf8(std::string& out, char32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
        return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr uint8_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kLead[more] | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
}

size_t append_lossy(std::string& out, std::string_view bytes, bool more) {
    size_t at = 0;
    while (at < bytes.size()) {
        const Character c = character_at(bytes, at);
        if (c.incomplete && more) break;
        if (c.valid)
            out.append(bytes.substr(at, c.length));
        else
            out.append(kReplacement);
        at += c.length;
    }
    return at;
}

bool is_space(char32_t code) {
    if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
    return code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) ||
           code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

bool is_word(char32_t code) {
    switch (category(code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC: return true;
        default: break;
    }
    // The joiners, and the circled and squared letters, which are Alphabetic.
    return code == 0x200C || code == 0x200D || (code >= 0x24B6 && code <= 0x24E9) ||
           (code >= 0x1F130 && code <= 0x1F149) || (code >= 0x1F150 && code <= 0x1F169) ||
           (code >= 0x1F170 && code <= 0x1F189);
}

bool is_numeric(char32_t code) {
    const auto c = category(code);
    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(char32_t code) {
    if (code < 0x80)
        return (code >= 33 && code <= 47) || (code >= 58 && code <= 64) || (code >= 91 && code <= 96) ||
               (code >= 123 && code <= 126);
    const auto c = category(code);
    return c >= UTF8PROC_CATEGORY_PC && c <= UTF8PROC_CATEGORY_PO;
}

bool is_mark(char32_t code) {
    const auto c = category(code);
    return c >= UTF8PROC_CATEGORY_MN && c <= UTF8PROC_CATEGORY_ME;
}

std::string normalize(std::string_view text, Form form) {
    // ASCII is its own normal form, and nothing composes across the left edge of an ASCII character: only
    // runs of other characters, with the ASCII character before them, need work.
    std::string out;
    out.reserve(text.size());
    std::vector<utf8proc_int32_t> codes(64);
    size_t done = 0, at = 0;
    while (at < text.size()) {
        while (at < text.size() && is_ascii(text[at])) ++at;
        if (at == text.size()) break;
        const size_t begin = at > done ? at - 1 : at;
        out.append(text.substr(done, begin - done));
        while (at < text.size() && !is_ascii(text[at])) ++at;
        append_form(out, text.substr(begin, at - begin), options_of(form), codes);
        done = at;
    }
    out.append(text.substr(done));
    return out;
}

std::string lowercase(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        const Character c = character_at(text, at);
        if (c.code == 0x130)
            out += "i\xCC\x87";  // the one character whose lower case is two
        else
            append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c.code))));
        at += c.length;
    }
    return out;
}

std::string_view byte_to_character(uint8_t byte) {
    const ByteTable& table = byte_table();
    return {table.text[byte].data(), table.length[byte]};
}

int character_to_byte(char32_t code) { return code < 324 ? byte_table().byte[code] : -1; }

std::string to_byte_characters(std::string_view bytes) {
    std::string out;
    out.reserve(bytes.size() * 2);
    for (const char b : bytes) out.append(byte_to_character(static_cast<uint8_t>(b)));
    return out;
}

std::string shown(std::string_view text) {
    std::string out = "'";
    for (const char c : text.substr(0, 48)) {
        const auto byte = static_cast<uint8_t>(c);
        if (byte >= 0x20 && byte < 0x7F)
            out += c;
        else
            out += fmt::format("\\x{:02x}", byte);
    }
    return out + (text.size() > 48 ? "...'" : "'");
}

}  // namespace ssm::tokenizer
