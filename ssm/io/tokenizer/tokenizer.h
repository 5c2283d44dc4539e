// Text <-> token ids: Hugging Face tokenizer.json with a BPE model, byte-level (GPT-2, GPT-NeoX, Qwen, Llama
// 3, Falcon) or SentencePiece style with byte fallback (Mistral, Gemma).
//
//   text -> added tokens -> normalizer -> added tokens -> pre-tokenizer -> BPE of every piece -> template
//   ids  -> token strings -> decoder steps -> text
//
// Source     the format and the semantics of the library `tokenizers` 0.23; ids equal its ids.
// BPE        of all adjacent pairs in a piece, the one with the lowest merge rank (leftmost first) is merged
//            until none is left. Sennrich et al. 2016.
// Read       BPE without dropout, subword prefix and suffix; all normalizers but Nmt, Precompiled and
//            BertNormalizer; all pre-tokenizers but UnicodeScripts and FixedLength; decoders ByteLevel,
//            ByteFallback, Fuse, Strip, Replace, Metaspace; templates. What is not read and changes ids is an
//            error that names it. `truncation` and `padding` are settings of a call and are ignored, as
//            transformers does.
// Limits     a file is at most 1 GiB and nested 64 deep; ids stay below 65,536 + size / 4; split patterns run
//            under PCRE2 match, heap and time limits. Every failure is ssm::Error "[tokenizer] ...".
// Cost       a piece that was seen before is one hash look-up (65,536 pieces are kept per concurrent caller);
//            a new piece of n symbols is O(n^2) for n <= 48, else O(n log n).
// Threads    const members may be called from any number of threads at once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

namespace tokenizer {
class Decoder;
struct DecoderState;
}  // namespace tokenizer

class Tokenizer {
public:
    // `path`: a tokenizer.json, also .zst, or a folder with one.
    static Tokenizer load(const std::filesystem::path& path);
    static Tokenizer parse(std::string_view json);

    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    ~Tokenizer();

    // Ids of UTF-8 text; invalid UTF-8 is an error that gives the offset of its first bad byte. With
    // `add_special` the post-processor's tokens (such as <s>) are added.
    std::vector<int32_t> encode(std::string_view text, bool add_special = false) const;

    // Text of ids; bytes that form no character become U+FFFD. Ids outside [0, size()) are an error.
    std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;

    // One more than the largest id. Embeddings are often padded above it.
    int32_t size() const;
    std::optional<int32_t> id_of(std::string_view token) const;
    // The token as written in the vocabulary; empty for an id that has none.
    std::string_view token(int32_t id) const;
    // Whether `id` is an added token marked special.
    bool is_special(int32_t id) const;

private:
    friend class StreamDecoder;
    struct Impl;
    explicit Tokenizer(std::unique_ptr<const Impl> impl);
    std::unique_ptr<const Impl> impl_;
};

// Decoding one id at a time. The texts returned by push and flush, joined, are decode(ids); each is complete
// UTF-8. Text that later ids may still change is held back: a character of which bytes are missing, a run of
// byte-fallback tokens until it ends. U+FFFD therefore appears only once no later id could complete the
// character. An id without a token (a padded embedding row) adds nothing. `tokenizer` must outlive this.
class StreamDecoder {
public:
    explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true);
    StreamDecoder(StreamDecoder&&) noexcept;
    ~StreamDecoder();

    std::string push(int32_t id);
    // What was held back; afterwards the decoder is as new.
    std::string flush();

private:
    const Tokenizer* tokenizer_;
    bool skip_special_;
    std::unique_ptr<tokenizer::DecoderState> state_;
};

}  // namespace ssm
