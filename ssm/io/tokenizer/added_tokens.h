// Added tokens: fixed strings that are cut out of the text before it is split. Leftmost first, longest first.
//
// Those with normalized = false are looked for in the text as given, the others, in their normalized form, in
// the normalized text between them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ssm/io/tokenizer/bpe.h"
#include "ssm/io/tokenizer/normalizer.h"

namespace ssm::tokenizer {

struct AddedToken {
    int32_t id = -1;
    std::string content;
    std::string normalized_content;  // what decoding shows
    bool single_word = false, left_strip = false, right_strip = false, normalized = true, special = false;
};

// A set of strings as a trie of bytes.
class StringSet {
public:
    bool insert(std::string_view text, int32_t value);  // false: there already
    bool empty() const { return nodes_.size() == 1; }
    // The longest member that `text` has at `at`: its value, and its length in `length`; else -1.
    int32_t longest(std::string_view text, size_t at, size_t& length) const;
    bool may_start(char byte) const { return root_[static_cast<uint8_t>(byte)] >= 0; }

private:
    struct Node {
        int32_t value = -1, child = -1, sibling = -1;
        char byte = 0;
    };
    int32_t child_of(int32_t node, char byte) const;

    std::vector<Node> nodes_{1};
    std::vector<int32_t> root_ = std::vector<int32_t>(256, -1);
};

class AddedTokens {
public:
    AddedTokens(const Document& document, const BpeModel& model, const Normalizer& normalizer);

    const AddedToken* find(int32_t id) const;
    const AddedToken* find(std::string_view content) const;
    int32_t size() const { return size_; }  // largest id + 1

    // on_text(piece, offset) and on_token(id), in order, covering `text`. `normalized`: which kind to find.
    template <class Text, class Token>
    void split(std::string_view text, bool normalized, Text&& on_text, Token&& on_token) const {
        const StringSet& set = normalized ? normalized_ : raw_;
        size_t done = 0, at = 0, length = 0;
        while (!set.empty() && at < text.size()) {
            const int32_t index = set.may_start(text[at]) ? set.longest(text, at, length) : -1;
            if (index < 0) {
                ++at;
                continue;
            }
            const AddedToken& token = tokens_[static_cast<size_t>(index)];
            size_t begin = at, end = at + length;
            at = end;
            if (!widen(token, text, done, begin, end)) continue;
            if (done < begin) on_text(text.substr(done, begin - done), done);
            on_token(token.id);
            done = end;
            at = std::max(at, end);
        }
        if (done < text.size()) on_text(text.substr(done), done);
    }

private:
    void add(AddedToken token, const BpeModel& model);
    // Applies single_word (false: no match), left_strip and right_strip.
    static bool widen(const AddedToken& token, std::string_view text, size_t done, size_t& begin,
                      size_t& end);

    std::vector<AddedToken> tokens_;
    std::unordered_map<int32_t, size_t> by_id_;
    std::unordered_map<std::string, size_t> by_content_;
    StringSet raw_, normalized_;
    int32_t size_ = 0;
};

}  // namespace ssm::tokenizer
