// Code points, classes and normal forms that the tokenizer needs, over utf8proc.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ssm::tokenizer {

// Offset of the first byte that is not part of valid UTF-8 (no overlong forms, no surrogates), or npos.
size_t first_invalid_utf8(std::string_view text);

// Bytes at `text[at]` that form one character; 0 if they cannot, even with more bytes; and `wanted` is set to
// the length of the valid prefix (at least 1). A truncated but so far valid character sets `incomplete`.
struct Character {
    char32_t code = 0;
    size_t length = 0;        // bytes consumed: a character, or the longest valid prefix of one, at least 1
    bool valid = false;       // a whole character
    bool incomplete = false;  // the text ended inside a character that may still be valid
};
Character character_at(std::string_view text, size_t at);

void append_utf8(std::string& out, char32_t code);

// Appends `bytes` with every maximal invalid prefix replaced by U+FFFD. A character cut at the end is left
// when `more` is set. Returns the number of bytes consumed.
size_t append_lossy(std::string& out, std::string_view bytes, bool more);

bool is_space(char32_t code);        // White_Space
bool is_word(char32_t code);         // \w: Alphabetic, marks, decimal digits, connectors, joiners
bool is_numeric(char32_t code);      // category N
bool is_punctuation(char32_t code);  // ASCII punctuation or category P
bool is_mark(char32_t code);         // category M

enum class Form { nfc, nfd, nfkc, nfkd };
std::string normalize(std::string_view text, Form form);
std::string lowercase(std::string_view text);

// GPT-2's bijection of bytes to printable characters (Radford et al. 2019, encoder.py): printable Latin-1
// bytes are themselves, the others are U+0100, U+0101, ... in order.
std::string_view byte_to_character(uint8_t byte);
// The byte of a character, or -1.
int character_to_byte(char32_t code);
std::string to_byte_characters(std::string_view bytes);

// 'text' for messages: printable ASCII, the rest escaped, cut after 48 bytes.
std::string shown(std::string_view text);

}  // namespace ssm::tokenizer
