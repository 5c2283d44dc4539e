#include "ssm/train/encoder.h"

#include <fmt/core.h>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/tokenizer.h"
#include "ssm/io/zstd_reader.h"
#include "ssm/train/hash.h"

namespace ssm {
namespace {

constexpr int kBytes = 256;
constexpr int kEnd = 255;

// The printable character that stands for a byte in byte-level vocabularies (Radford et al. 2019): itself if
// it is printable Latin-1, else the next of U+0100, U+0101, ...
std::vector<int> byte_characters() {
    std::vector<int> character(kBytes);
    int next = 256;
    for (int b = 0; b < kBytes; ++b) {
        const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        character[b] = printable ? b : next++;
    }
    return character;
}

std::string byte_tokenizer_json() {
    std::string vocabulary;
    const auto character = byte_characters();
    for (int b = 0; b < kEnd; ++b) vocabulary += fmt::format("\"\\u{:04x}\": {}, ", character[b], b);
    vocabulary += fmt::format("\"<|endoftext|>\": {}", kEnd);
    return fmt::format(R"({{
 "version": "1.0", "truncation": null, "padding": null,
 "added_tokens": [{{"id": {}, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
 "normalizer": null,
 "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}},
 "post_processor": null,
 "decoder": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}},
 "model": {{"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
  "vocab": {{{}}}, "merges": []}}
}}
)",
                       kEnd, vocabulary);
}

}  // namespace

TextEncoder byte_encoder() {
    TextEncoder e;
    e.encode = [](std::string_view text, std::vector<int32_t>& ids) {
        ids.reserve(ids.size() + text.size());
        for (char c : text) ids.push_back(static_cast<unsigned char>(c));
    };
    e.end_of_document = kEnd;
    e.vocabulary = kBytes;
    e.tokenizer_json = byte_tokenizer_json();
    e.fingerprint = hash_bytes(e.tokenizer_json);
    return e;
}

TextEncoder tokenizer_encoder(const std::filesystem::path& path, std::string_view end) {
    TextEncoder e;
    e.tokenizer_json = read_whole_text(std::filesystem::is_directory(path) ? path / "tokenizer.json" : path);
    const auto bpe = std::make_shared<const Tokenizer>(Tokenizer::load(path));
    std::optional<int32_t> id;
    for (const std::string_view name :
         {end, std::string_view("<|endoftext|>"), std::string_view("<|end_of_text|>"),
          std::string_view("</s>"), std::string_view("<eos>")}) {
        if (!id) id = bpe->id_of(name);
    }
    require(id.has_value(), "corpus", "the tokenizer `{}` has no token that ends a document, such as `{}`",
            path.string(), end);
    e.encode = [bpe](std::string_view text, std::vector<int32_t>& ids) {
        const auto more = bpe->encode(text);
        ids.insert(ids.end(), more.begin(), more.end());
    };
    e.end_of_document = *id;
    e.vocabulary = bpe->size();
    e.fingerprint = hash_bytes(e.tokenizer_json, static_cast<uint64_t>(*id));
    return e;
}

}  // namespace ssm
