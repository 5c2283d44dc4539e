// Byte-level BPE, trained: from text to a tokenizer.json that this library and Hugging Face's read alike.
//
//   1. documents are cut into pieces by the split pattern, pieces counted, their bytes are the first symbols
//   2. until the vocabulary is full: the most frequent adjacent pair becomes a symbol, everywhere
//
// Source     Sennrich et al. 2016, alg. 1; ids, order of ties (smaller ids first) and file as in
//            `tokenizers`.
// Ids        special tokens, the 256 bytes in order of their characters, then symbols in order of creation.
// Result     depends on the documents and the options only, not on threads or on the order of documents.
// Cost       counting is linear in the text; a merge touches the places of its pair only (lists of
//            positions, a heap of counts): all merges together about 25 bytes and a few look-ups per symbol
//            of a distinct piece and merge that touches it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

struct BpeTrainerOptions {
    int64_t vocab_size = 32000;  // special tokens and bytes included
    int64_t min_frequency = 2;   // a pair that is rarer is not merged
    std::vector<std::string> special_tokens;
    std::string pattern;  // in Oniguruma's syntax; empty: GPT-2's
    int threads = 0;      // 0: all cores
};

class BpeTrainer {
public:
    explicit BpeTrainer(BpeTrainerOptions options);
    ~BpeTrainer();

    // Counts the pieces of documents (UTF-8); a document is not cut at special tokens.
    void add(std::span<const std::string_view> documents);

    // The tokenizer.json. `progress(tokens)` is told the size of the vocabulary now and then. The vocabulary
    // stays smaller than asked for when no pair is frequent enough.
    std::string train(const std::function<void(int64_t tokens)>& progress = {}) const;

private:
    struct Counts;
    BpeTrainerOptions options_;
    std::unique_ptr<Counts> counts_;
};

// One call for texts in memory.
std::string train_bpe(std::span<const std::string_view> documents, const BpeTrainerOptions& options);

}  // namespace ssm
