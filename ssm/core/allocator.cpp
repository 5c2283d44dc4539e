#include "ssm/core/allocator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ssm/core/error.h"

namespace ssm {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// Eight classes per power of two: at most 12.5 % is wasted.
size_t size_class(size_t bytes) {
    size_t step = kCacheLine;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

}  // namespace

std::byte* allocate_aligned(size_t bytes) {
    const size_t align = bytes >= kHugePage ? kHugePage : kCacheLine;
    const size_t rounded = (bytes + align - 1) / align * align;
    void* p = std::aligned_alloc(align, rounded == 0 ? align : rounded);
    if (p == nullptr) fail(ErrorCode::io, "memory", "cannot allocate {} bytes", bytes);
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return static_cast<std::byte*>(p);
}

void free_aligned(std::byte* p, size_t) noexcept { std::free(p); }

Allocator::~Allocator() { Allocator::trim(); }

void Allocator::trim() noexcept {
    std::lock_guard lock(mutex_);
    for (auto& [capacity, blocks] : free_) {
        for (std::byte* p : blocks) release(p, capacity);
        reserved_ -= capacity * blocks.size();
    }
    free_.clear();
    for (const Segments::Piece& s : segments_.remove_free()) {
        release(s.data, s.bytes);
        reserved_ -= s.bytes;
    }
}

void Allocator::zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
void Allocator::copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void Allocator::copy_in(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void Allocator::copy_out(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

std::byte* Allocator::take_kept(size_t capacity) {
    if (capacity >= smallest_piece()) return segments_.take(capacity);
    const auto it = free_.find(capacity);
    if (it == free_.end() || it->second.empty()) return nullptr;
    std::byte* p = it->second.back();
    it->second.pop_back();
    return p;
}

std::byte* Allocator::take(size_t bytes, size_t& capacity) {
    const bool piece = bytes >= smallest_piece();
    capacity = piece ? (bytes + Segments::kGranule - 1) / Segments::kGranule * Segments::kGranule
                     : size_class(bytes == 0 ? 1 : bytes);
    {
        std::lock_guard lock(mutex_);
        in_use_ += capacity;
        if (in_use_ > peak_) peak_ = in_use_;
        if (std::byte* p = take_kept(capacity)) {
            if (withholding_) taken_.push_back({p, capacity});
            return p;
        }
    }
    try {
        std::byte* p = allocate(capacity);
        std::lock_guard lock(mutex_);
        reserved_ += capacity;
        if (capacity >= smallest_piece()) segments_.add(p, capacity);
        if (withholding_) taken_.push_back({p, capacity});
        return p;
    } catch (...) {
        std::lock_guard lock(mutex_);
        in_use_ -= capacity;
        throw;
    }
}

void Allocator::give(std::byte* p, size_t capacity) noexcept {
    std::lock_guard lock(mutex_);
    in_use_ -= capacity;
    if (!segments_.give(p)) free_[capacity].push_back(p);
}

// What is captured then finds as little as its first run did, whose blocks are let go: it places them the
// same way, instead of cutting up the segment that the largest will need.
void Allocator::start_withholding() {
    trim();
    std::lock_guard lock(mutex_);
    taken_.clear();
    withholding_ = true;
}

std::vector<Allocator::Block> Allocator::stop_withholding() {
    std::lock_guard lock(mutex_);
    withholding_ = false;
    std::vector<Block> withheld;
    std::vector<Segments::Piece> pieces;
    for (const Block& block : taken_) {
        if (block.capacity >= smallest_piece()) {
            pieces.push_back({block.data, block.capacity});
            continue;
        }
        std::vector<std::byte*>& free = free_[block.capacity];
        const auto it =
            std::find(free.begin(), free.end(), block.data);  // once: it may have been taken twice
        if (it == free.end()) continue;
        free.erase(it);
        withheld.push_back(block);
    }
    taken_.clear();
    for (const Segments::Piece& p : segments_.take_free(pieces)) withheld.push_back({p.data, p.bytes});
    for (const Block& block : withheld) in_use_ += block.capacity;
    peak_ = std::max(peak_, in_use_);
    return withheld;
}

void Allocator::give_back(std::vector<Block> blocks) noexcept {
    for (const Block& block : blocks) give(block.data, block.capacity);
}

size_t Allocator::bytes_in_use() const {
    std::lock_guard lock(mutex_);
    return in_use_;
}

size_t Allocator::peak_bytes() const {
    std::lock_guard lock(mutex_);
    return peak_;
}

size_t Allocator::reserved_bytes() const {
    std::lock_guard lock(mutex_);
    return reserved_;
}

}  // namespace ssm
