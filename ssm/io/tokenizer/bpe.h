// Byte-pair encoding of one piece of text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ssm/io/tokenizer/document.h"

namespace ssm::tokenizer {

// (left, right) -> (rank, merged id): open addressing, at most half full.
class MergeTable {
public:
    struct Merge {
        int32_t rank = -1, id = -1;  // rank -1: the pair does not merge
    };
    explicit MergeTable(size_t count);
    void insert(int32_t left, int32_t right, Merge merge);  // a later insertion of the same pair wins
    Merge find(int32_t left, int32_t right) const {
        const uint64_t key = key_of(left, right);
        for (size_t at = slot(key);; at = (at + 1) & mask_)
            if (slots_[at].key == key)
                return slots_[at].merge;
            else if (slots_[at].key == kEmpty)
                return {};
    }

private:
    static constexpr uint64_t kEmpty = ~uint64_t{0};
    struct Slot {
        uint64_t key = kEmpty;
        Merge merge;
    };
    static uint64_t key_of(int32_t left, int32_t right) {
        return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
    }
    size_t slot(uint64_t key) const { return static_cast<size_t>((key ^ key >> 29) * salt_ >> shift_); }

    std::vector<Slot> slots_;
    uint64_t salt_;  // odd, random: a file cannot choose pairs that collide
    size_t mask_;
    int shift_;
};

// Working memory of encode.
struct BpeScratch {
    struct Symbol {
        int32_t id, previous, next;
    };
    struct Candidate {
        int32_t rank, position, id;
    };
    std::vector<int32_t> ids;
    std::vector<MergeTable::Merge> merges;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    std::string text;
};

class BpeModel {
public:
    explicit BpeModel(const Document& document);

    // Appends the ids of a piece. `raw_bytes`: the piece is text whose bytes are to be read as GPT-2's byte
    // characters; else its characters are the first symbols.
    void encode(std::string_view piece, bool raw_bytes, BpeScratch& scratch, std::vector<int32_t>& out) const;

    // The first part of a piece of characters that no merge joins to what follows, or the whole piece: the
    // ids of a piece are those of its parts, one after the other. Parts end before a space symbol (U+2581)
    // after another character, if no merge in the file makes a token in which one stands there, as in
    // SentencePiece's vocabularies.
    std::string_view first_part(std::string_view piece) const;

    int32_t find(std::string_view token) const;  // -1: absent
    std::string_view token(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }
    bool has(int32_t id) const;
    int32_t size() const { return static_cast<int32_t>(tokens_.size()); }  // largest id + 1

private:
    bool never_joins_spaces(const Document& document) const;
    void first_symbols(std::string_view text, std::vector<int32_t>& ids) const;
    bool byte_fallback(std::string_view character, std::vector<int32_t>& ids) const;
    int32_t unknown_id() const;
    void merge_short(BpeScratch& scratch) const;
    void merge_long(BpeScratch& scratch) const;

    std::vector<std::string> tokens_;  // by id
    std::vector<bool> present_;
    std::unordered_map<std::string_view, int32_t> ids_;  // views into tokens_
    MergeTable merges_;
    std::vector<int32_t> byte_ids_;      // of GPT-2's byte characters
    std::vector<int32_t> fallback_ids_;  // of <0x00>..<0xFF>
    bool all_bytes_ = false;             // every byte character has an id
    bool byte_fallback_ = false, fuse_unknown_ = false, ignore_merges_ = false;
    bool parts_ = false;  // pieces can be cut before a space symbol
    std::string unknown_;
};

}  // namespace ssm::tokenizer
