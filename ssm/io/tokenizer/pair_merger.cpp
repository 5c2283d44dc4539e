#include "ssm/io/tokenizer/pair_merger.h"

#include <algorithm>
#include <limits>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

uint64_t key_of(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

void PairMerger::add_word(std::span<const int32_t> symbols, int64_t count) {
    if (symbols.size() < 2) return;
    const size_t begin = symbols_.size();
    require(begin + symbols.size() < std::numeric_limits<int32_t>::max(), "tokenizer",
            "the distinct pieces of the text have more than 2^31 bytes");
    frequency_.push_back(count);
    for (size_t i = 0; i < symbols.size(); ++i) {
        const auto at = static_cast<int32_t>(begin + i);
        symbols_.push_back(symbols[i]);
        previous_.push_back(i > 0 ? at - 1 : -1);
        next_.push_back(i + 1 < symbols.size() ? at + 1 : -1);
        word_.push_back(static_cast<uint32_t>(frequency_.size() - 1));
        if (i + 1 < symbols.size()) increase(symbols[i], symbols[i + 1], static_cast<uint32_t>(at), count);
    }
}

uint32_t PairMerger::places_of(int32_t left, int32_t right) {
    const auto [found, fresh] =
        index_.try_emplace(key_of(left, right), static_cast<uint32_t>(places_.size()));
    if (fresh) places_.push_back({found->first, 0, {}, false});
    return found->second;
}

void PairMerger::decrease(int32_t left, int32_t right, int64_t by) {
    places_[places_of(left, right)].count -= by;
}

void PairMerger::increase(int32_t left, int32_t right, uint32_t position, int64_t by) {
    const uint32_t index = places_of(left, right);
    Places& places = places_[index];
    places.count += by;
    places.positions.push_back(position);
    if (!places.queued) {
        places.queued = true;
        new_.push_back(index);
    }
}

void PairMerger::queue_new() {
    for (const uint32_t index : new_) {
        Places& places = places_[index];
        places.queued = false;
        if (places.count > 0) heap_.push({places.count, places.key, index});
    }
    new_.clear();
}

PairMerger::Pair PairMerger::top() {
    queue_new();
    while (!heap_.empty()) {
        const Entry entry = heap_.top();
        const int64_t count = places_[entry.places].count;
        if (entry.count == count)
            return {static_cast<int32_t>(entry.key >> 32), static_cast<int32_t>(entry.key & 0xFFFFFFFFu),
                    count};
        heap_.pop();
        if (count > 0 && count < entry.count) heap_.push({count, entry.key, entry.places});
    }
    return {-1, -1, 0};
}

void PairMerger::merge(int32_t id) {
    const Entry entry = heap_.top();
    heap_.pop();
    const auto left = static_cast<int32_t>(entry.key >> 32),
               right = static_cast<int32_t>(entry.key & 0xFFFFFFFFu);
    std::vector<uint32_t> positions = std::move(places_[entry.places].positions);
    places_[entry.places].positions.clear();
    std::ranges::sort(positions);
    for (const uint32_t p : positions) {
        const int32_t q = next_[p];
        if (symbols_[p] != left || q < 0 || symbols_[static_cast<size_t>(q)] != right) continue;
        const auto at = static_cast<size_t>(q);
        const int64_t count = frequency_[word_[p]];
        const int32_t before = previous_[p], after = next_[at];
        places_[entry.places].count -= count;
        symbols_[p] = id;
        symbols_[at] = -1;
        next_[p] = after;
        if (before >= 0) {
            const int32_t symbol = symbols_[static_cast<size_t>(before)];
            decrease(symbol, left, count);
            increase(symbol, id, static_cast<uint32_t>(before), count);
        }
        if (after >= 0) {
            previous_[static_cast<size_t>(after)] = static_cast<int32_t>(p);
            const int32_t symbol = symbols_[static_cast<size_t>(after)];
            decrease(right, symbol, count);
            increase(id, symbol, p, count);
        }
    }
}

}  // namespace ssm::tokenizer
