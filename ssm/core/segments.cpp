#include "ssm/core/segments.h"

#include <algorithm>
#include <cassert>
#include <functional>

namespace ssm {

void Segments::set_free(Pieces::iterator p, bool free) {
    if (p->second.free == free) return;
    p->second.free = free;
    if (free)
        free_.insert({p->second.bytes, p->first});
    else
        free_.erase({p->second.bytes, p->first});
}

void Segments::split(Pieces::iterator p, size_t bytes) {
    if (bytes == 0 || bytes >= p->second.bytes) return;
    const bool free = p->second.free;
    set_free(p, false);
    const auto rest = pieces_.insert({p->first + bytes, {p->second.bytes - bytes, false, false}}).first;
    p->second.bytes = bytes;
    set_free(rest, free);
    set_free(p, free);
}

void Segments::join_next(Pieces::iterator p) {
    const auto next = std::next(p);
    if (next == pieces_.end() || next->second.starts_segment || !next->second.free || !p->second.free) return;
    set_free(p, false);
    set_free(next, false);
    p->second.bytes += next->second.bytes;
    pieces_.erase(next);
    set_free(p, true);
}

std::byte* Segments::take(size_t bytes) {
    const auto found = free_.lower_bound({bytes, nullptr});
    if (found == free_.end()) return nullptr;
    const auto p = pieces_.find(found->second);
    split(p, bytes);
    set_free(p, false);
    return p->first;
}

void Segments::add(std::byte* p, size_t bytes) { pieces_[p] = {bytes, false, true}; }

bool Segments::give(std::byte* data) noexcept {
    const auto p = pieces_.find(data);
    if (p == pieces_.end()) return false;
    assert(!p->second.free);
    set_free(p, true);
    join_next(p);
    if (!p->second.starts_segment) join_next(std::prev(p));
    return true;
}

std::vector<Segments::Piece> Segments::take_free(const std::vector<Piece>& pieces) {
    std::vector<Piece> taken;
    for (const Piece& wanted : pieces) {
        std::byte* const end = wanted.data + wanted.bytes;
        auto p = pieces_.upper_bound(wanted.data);
        if (p != pieces_.begin()) --p;  // the piece that holds the first byte
        for (; p != pieces_.end() && std::less<>{}(p->first, end); ++p) {
            if (!p->second.free || !std::less<>{}(wanted.data, p->first + p->second.bytes)) continue;
            if (std::less<>{}(p->first, wanted.data)) {
                split(p, static_cast<size_t>(wanted.data - p->first));
                continue;  // the rest is the next piece
            }
            split(p, static_cast<size_t>(end - p->first));
            set_free(p, false);
            taken.push_back({p->first, p->second.bytes});
        }
    }
    return taken;
}

std::vector<Segments::Piece> Segments::remove_free() {
    std::vector<Piece> removed;
    for (auto p = pieces_.begin(); p != pieces_.end();) {
        const auto next = std::next(p);
        const bool whole = next == pieces_.end() || next->second.starts_segment;
        if (p->second.free && p->second.starts_segment && whole) {
            removed.push_back({p->first, p->second.bytes});
            set_free(p, false);
            pieces_.erase(p);
        }
        p = next;
    }
    return removed;
}

}  // namespace ssm
