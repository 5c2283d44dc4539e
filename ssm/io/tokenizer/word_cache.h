// Piece -> ids, for pieces that come again. Grows to a fixed size, then starts afresh.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ssm::tokenizer {

class WordCache {
public:
    static constexpr size_t kMaxPiece = 64;         // bytes; longer ones rarely come again
    static constexpr size_t kMaxEntries = 1 << 16;  // then everything is forgotten

    static uint64_t hash(std::string_view piece) {
        uint64_t h = piece.size() * 0x9E3779B97F4A7C15u;
        while (piece.size() >= 8) {
            h = mix(h, piece.data(), 8);
            piece.remove_prefix(8);
        }
        return piece.empty() ? h : mix(h, piece.data(), piece.size());
    }

    // The ids of a piece of hash `h`; null data if unknown.
    std::span<const int32_t> find(std::string_view piece, uint64_t h) const {
        for (size_t at = h & (slots_.size() - 1); slots_[at].used; at = (at + 1) & (slots_.size() - 1)) {
            const Slot& slot = slots_[at];
            if (slot.hash == h && std::string_view(text_).substr(slot.text, slot.size) == piece)
                return {ids_.data() + slot.ids, slot.count};
        }
        return {};
    }

    void insert(std::string_view piece, uint64_t h, std::span<const int32_t> ids) {
        if (count_ == kMaxEntries) *this = WordCache();
        if (2 * count_ >= slots_.size()) grow();
        place({h, static_cast<uint32_t>(text_.size()), static_cast<uint32_t>(ids_.size()),
               static_cast<uint16_t>(piece.size()), static_cast<uint16_t>(ids.size()), true});
        text_.append(piece);
        ids_.insert(ids_.end(), ids.begin(), ids.end());
        ++count_;
    }

private:
    struct Slot {
        uint64_t hash = 0;
        uint32_t text = 0, ids = 0;
        uint16_t size = 0, count = 0;
        bool used = false;
    };

    static uint64_t mix(uint64_t h, const char* data, size_t size) {
        uint64_t word = 0;
        std::memcpy(&word, data, size);
        h = (h ^ word) * 0xD6E8FEB86659FD93u;
        return h ^ h >> 32;
    }

    void place(const Slot& slot) {
        size_t at = slot.hash & (slots_.size() - 1);
        while (slots_[at].used) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = slot;
    }

    void grow() {
        std::vector<Slot> old(slots_.size() * 2);
        old.swap(slots_);
        for (const Slot& slot : old)
            if (slot.used) place(slot);
    }

    std::vector<Slot> slots_ = std::vector<Slot>(1024);
    std::string text_;
    std::vector<int32_t> ids_;
    size_t count_ = 0;
};

}  // namespace ssm::tokenizer
