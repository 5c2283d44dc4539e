// The pre-tokenizer of a tokenizer.json: cuts text into the pieces that BPE works on.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "ssm/io/tokenizer/normalizer.h"

namespace ssm::tokenizer {

// GPT-2's split pattern (Radford et al. 2019, encoder.py).
inline constexpr std::string_view kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

class PreTokenizer {
public:
    explicit PreTokenizer(const nlohmann::json& object);

    // sink(piece, raw_bytes) for every non-empty piece in order. `raw_bytes`: a final ByteLevel step is left
    // to the model, which reads the piece's bytes as byte characters. `at_start`: text begins the whole
    // input.
    using Sink = std::function<void(std::string_view piece, bool raw_bytes)>;
    void run(std::string_view text, bool at_start, RegexScratch& scratch, const Sink& sink) const;

private:
    enum class CharacterClass { numeric, punctuation, space };
    enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
    struct Split {
        std::variant<Pattern, CharacterClass> delimiter;
        Behavior behavior;
        bool invert = false;
    };
    struct ByteLevel {
        bool prefix_space;
        std::vector<Split> split;  // GPT-2's, or none
    };
    struct Metaspace {
        std::string replacement;
        enum class Prepend { always, first, never } prepend;
        std::vector<Split> split;  // one or none
    };
    using Step = std::variant<Split, ByteLevel, Metaspace>;

    struct Piece {
        size_t begin, end;
        bool matched;
    };

    void read(const nlohmann::json& step);
    static Split read_split(const nlohmann::json& step);
    static Metaspace read_metaspace(const nlohmann::json& step);
    static Behavior read_behavior(const nlohmann::json& step, std::string_view what);

    void run_step(size_t step, std::string_view text, bool at_start, RegexScratch& scratch,
                  const Sink& sink) const;
    template <class F>
    static void find_pieces(const Split& split, std::string_view text, RegexScratch& scratch, F&& f);
    template <class F>
    static void for_each_piece(const Split& split, std::string_view text, RegexScratch& scratch, F&& f);
    static std::vector<Piece> merge_pieces(Behavior behavior, const std::vector<Piece>& pieces);

    std::vector<Step> steps_;
};

}  // namespace ssm::tokenizer
