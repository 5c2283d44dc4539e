#include "ssm/io/tokenizer/bpe_trainer.h"

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "ssm/core/error.h"
#include "ssm/core/exec.h"
#include "ssm/core/parallel.h"
#include "ssm/io/tokenizer/pair_merger.h"
#include "ssm/io/tokenizer/pre_tokenizer.h"

namespace ssm {

namespace {

using namespace tokenizer;

struct PieceHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using PieceCounts = std::unordered_map<std::string, int64_t, PieceHash, std::equal_to<>>;

nlohmann::ordered_json byte_level(bool use_regex) {
    return {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

nlohmann::ordered_json pre_tokenizer_of(const std::string& pattern) {
    if (pattern.empty()) return byte_level(true);
    return {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}},
          byte_level(false)}}};
}

struct Vocabulary {
    std::vector<std::string> tokens;  // by id
    std::unordered_map<std::string, int32_t> ids;
    std::vector<std::pair<int32_t, int32_t>> merges;

    int32_t add(const std::string& token) {
        const auto [found, fresh] = ids.emplace(token, static_cast<int32_t>(tokens.size()));
        if (fresh) tokens.push_back(token);
        return found->second;
    }
};

// Special tokens, then the 256 bytes in order of their characters; byte -> id.
std::array<int32_t, 256> add_bytes(Vocabulary& vocabulary, const std::vector<std::string>& special) {
    for (const std::string& token : special) vocabulary.add(token);
    std::array<int32_t, 256> ids{};
    for (char32_t code = 0; code < 324; ++code)
        if (const int byte = character_to_byte(code); byte >= 0)
            ids[static_cast<size_t>(byte)] =
                vocabulary.add(std::string(byte_to_character(static_cast<uint8_t>(byte))));
    return ids;
}

std::string text_of(const std::string& token) { return nlohmann::json(token).dump(); }

std::string write_json(const Vocabulary& vocabulary, const BpeTrainerOptions& options) {
    nlohmann::ordered_json added = nlohmann::ordered_json::array();
    for (size_t id = 0; id < options.special_tokens.size(); ++id)
        added.push_back({{"id", id},
                         {"content", options.special_tokens[id]},
                         {"single_word", false},
                         {"lstrip", false},
                         {"rstrip", false},
                         {"normalized", false},
                         {"special", true}});
    std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n";
    out += "  \"added_tokens\": " + added.dump() + ",\n  \"normalizer\": null,\n";
    out += "  \"pre_tokenizer\": " + pre_tokenizer_of(options.pattern).dump() + ",\n";
    out += "  \"post_processor\": " + byte_level(true).dump() + ",\n";
    out += "  \"decoder\": " + byte_level(true).dump() + ",\n";
    out += "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n";
    out += "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n";
    out += "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n";
    out += "    \"vocab\": {";
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id)
        out += fmt::format("{}\n      {}: {}", id > 0 ? "," : "", text_of(vocabulary.tokens[id]), id);
    out += "\n    },\n    \"merges\": [";
    for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
        const auto [left, right] = vocabulary.merges[i];
        out += fmt::format("{}\n      {}", i > 0 ? "," : "",
                           text_of(vocabulary.tokens[static_cast<size_t>(left)] + ' ' +
                                   vocabulary.tokens[static_cast<size_t>(right)]));
    }
    return out + "\n    ]\n  }\n}\n";
}

void check_special(std::vector<std::string>& tokens) {
    std::vector<std::string> kept;
    for (const std::string& token : tokens) {
        require(!token.empty(), "tokenizer", "a special token is empty");
        require(token.size() <= 1024, "tokenizer", "special token {} is longer than 1024 bytes",
                shown(token));
        require(first_invalid_utf8(token) == std::string_view::npos, "tokenizer",
                "special token {} is not valid UTF-8", shown(token));
        if (std::ranges::find(kept, token) == kept.end()) kept.push_back(token);
    }
    tokens = std::move(kept);
}

}  // namespace

struct BpeTrainer::Counts {
    explicit Counts(const std::string& pattern) : pre_tokenizer(nlohmann::json(pre_tokenizer_of(pattern))) {}
    PreTokenizer pre_tokenizer;
    PieceCounts pieces;
};

BpeTrainer::BpeTrainer(BpeTrainerOptions options) : options_(std::move(options)) {
    check_special(options_.special_tokens);
    const auto least = static_cast<int64_t>(256 + options_.special_tokens.size());
    require(options_.vocab_size >= least, "tokenizer",
            "a vocabulary of {} is too small: 256 bytes and {} special tokens need {}", options_.vocab_size,
            options_.special_tokens.size(), least);
    require(options_.vocab_size <= 1 << 24, "tokenizer", "a vocabulary of {} is larger than {}",
            options_.vocab_size, 1 << 24);
    require(options_.min_frequency >= 1, "tokenizer", "the minimum frequency must be at least 1 but is {}",
            options_.min_frequency);
    counts_ = std::make_unique<Counts>(options_.pattern);
}

BpeTrainer::~BpeTrainer() = default;

void BpeTrainer::add(std::span<const std::string_view> documents) {
    for (size_t i = 0; i < documents.size(); ++i)
        if (const size_t at = first_invalid_utf8(documents[i]); at != std::string_view::npos)
            fail(ErrorCode::invalid_argument, "tokenizer", "document {} is not valid UTF-8 at byte {}", i,
                 at);
    std::mutex mutex;
    std::exception_ptr error;
    const auto count = [&](int64_t begin, int64_t end) {
        PieceCounts pieces;
        RegexScratch scratch;
        const PreTokenizer::Sink sink = [&](std::string_view piece, bool) {
            const auto found = pieces.find(piece);
            if (found != pieces.end())
                ++found->second;
            else
                pieces.emplace(piece, 1);
        };
        for (int64_t i = begin; i < end; ++i)
            counts_->pre_tokenizer.run(documents[static_cast<size_t>(i)], true, scratch, sink);
        const std::lock_guard lock(mutex);
        for (auto& [piece, n] : pieces) counts_->pieces[piece] += n;
    };
    parallel_for(make_cpu_exec(options_.threads), static_cast<int64_t>(documents.size()), 1,
                 [&](int64_t begin, int64_t end) noexcept {
                     try {
                         count(begin, end);
                     } catch (...) {
                         const std::lock_guard lock(mutex);
                         error = std::current_exception();
                     }
                 });
    if (error) std::rethrow_exception(error);
}

std::string BpeTrainer::train(const std::function<void(int64_t tokens)>& progress) const {
    Vocabulary vocabulary;
    const auto byte_ids = add_bytes(vocabulary, options_.special_tokens);
    PairMerger merger;
    std::vector<int32_t> symbols;
    for (const auto& [piece, count] : counts_->pieces) {
        symbols.clear();
        for (const char c : piece) symbols.push_back(byte_ids[static_cast<uint8_t>(c)]);
        merger.add_word(symbols, count);
    }
    while (static_cast<int64_t>(vocabulary.tokens.size()) < options_.vocab_size) {
        const auto [left, right, count] = merger.top();
        if (count < options_.min_frequency) break;
        vocabulary.merges.emplace_back(left, right);
        merger.merge(vocabulary.add(vocabulary.tokens[static_cast<size_t>(left)] +
                                    vocabulary.tokens[static_cast<size_t>(right)]));
        if (progress && vocabulary.merges.size() % 1024 == 0)
            progress(static_cast<int64_t>(vocabulary.tokens.size()));
    }
    if (progress) progress(static_cast<int64_t>(vocabulary.tokens.size()));
    return write_json(vocabulary, options_);
}

std::string train_bpe(std::span<const std::string_view> documents, const BpeTrainerOptions& options) {
    BpeTrainer trainer(options);
    trainer.add(documents);
    return trainer.train();
}

}  // namespace ssm
