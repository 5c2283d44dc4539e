// A small random model over bytes, as a folder with config, weights and tokenizer.
#pragma once

#include <string>

#include "tests/support/model_case.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {

// GPT-2's printable stand-in for a byte, in UTF-8.
inline std::string byte_symbol(int byte) {
    const auto printable = [](int b) {
        return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
    };
    int code = byte;
    if (!printable(byte)) {
        code = 256;
        for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
    }
    if (code < 128) return {static_cast<char>(code)};
    return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

// tokenizer.json: token i is byte i, 256 the special <|endoftext|>.
inline std::string byte_tokenizer() {
    nlohmann::json vocab = nlohmann::json::object();
    for (int b = 0; b < 256; ++b) vocab[byte_symbol(b)] = b;
    const nlohmann::json end = {{"id", 256},          {"content", "<|endoftext|>"},
                                {"special", true},    {"single_word", false},
                                {"lstrip", false},    {"rstrip", false},
                                {"normalized", false}};
    const nlohmann::json file = {
        {"version", "1.0"},
        {"added_tokens", {end}},
        {"normalizer", nullptr},
        {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
        {"post_processor", nullptr},
        {"decoder", {{"type", "ByteLevel"}}},
        {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
    return file.dump();
}

struct ByteModel {
    TempFolder folder;
    explicit ByteModel(ReferenceShape shape = {}, uint64_t seed = 1) {
        shape.vocab = 257;
        const ModelCase c(shape, seed);
        save_model(*c.model, folder.path(), {.layout = c.model->spec().layout});
        folder.file("tokenizer.json", byte_tokenizer());
    }
    std::string dir() const { return folder.path().string(); }
};

}  // namespace ssm::test
