// TextEncoder: how a corpus becomes ids. Either a tokenizer.json or, without one, the byte encoder:
//
//   id = value of the UTF-8 byte, 0 .. 254;   255 ends a document.   Vocabulary 256.
//
// 0xff never occurs in UTF-8, so its id is free to be the end of a document and the vocabulary stays 256.
// The encoder carries the tokenizer.json that is written beside the trained model: for bytes, a byte-level
// BPE without merges, so that the model runs like any other.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

struct TextEncoder {
    // Appends the ids of a document, without an end. Safe to call from several threads.
    std::function<void(std::string_view text, std::vector<int32_t>& ids)> encode;
    int32_t end_of_document = 0;
    int64_t vocabulary = 0;
    uint64_t fingerprint = 0;    // of everything that decides the ids
    std::string tokenizer_json;  // the file's content
};

TextEncoder byte_encoder();
// Of a tokenizer.json (or .zst, or a folder with one). Documents end with the id of `end`, or, if the
// tokenizer has no such token, of the first of <|endoftext|>, <|end_of_text|>, </s>, <eos> that it has;
// throws when it has none.
TextEncoder tokenizer_encoder(const std::filesystem::path& path, std::string_view end = "<|endoftext|>");

}  // namespace ssm
