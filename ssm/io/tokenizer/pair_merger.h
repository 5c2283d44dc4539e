// The merge loop of the BPE trainer, on integers.
#pragma once

#include <cstdint>
#include <queue>
#include <span>
#include <unordered_map>
#include <vector>

namespace ssm::tokenizer {

class PairMerger {
public:
    struct Pair {
        int32_t left, right;
        int64_t count;
    };

    // A word: its first symbols and how often it occurs.
    void add_word(std::span<const int32_t> symbols, int64_t count);

    // The most frequent pair, smaller ids first among equals; count 0 when there is none.
    Pair top();
    // Replaces every occurrence of the pair that top() returned, left to right, by `id`.
    void merge(int32_t id);

private:
    struct Places {
        uint64_t key;
        int64_t count = 0;
        std::vector<uint32_t> positions;  // where the pair was; checked before use
        bool queued = false;              // the heap has an entry with this count or more
    };
    struct Entry {
        int64_t count;
        uint64_t key;
        uint32_t places;
        bool operator<(const Entry& other) const {
            return count != other.count ? count < other.count : key > other.key;
        }
    };

    uint32_t places_of(int32_t left, int32_t right);
    void decrease(int32_t left, int32_t right, int64_t by);
    void increase(int32_t left, int32_t right, uint32_t position, int64_t by);
    void queue_new();

    // By position in the concatenation of all words; -1: swallowed, or no neighbour in the word.
    std::vector<int32_t> symbols_, previous_, next_;
    std::vector<uint32_t> word_;      // of a position
    std::vector<int64_t> frequency_;  // of a word
    std::vector<Places> places_;
    struct Hash {
        size_t operator()(uint64_t key) const {
            key *= 0x9E3779B97F4A7C15u;
            return static_cast<size_t>(key ^ key >> 32);
        }
    };
    std::unordered_map<uint64_t, uint32_t, Hash> index_;
    std::priority_queue<Entry> heap_;
    std::vector<uint32_t> new_;  // places that grew since the heap last saw them
};

}  // namespace ssm::tokenizer
