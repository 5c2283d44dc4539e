// A caching allocator: blocks of 64-byte aligned memory by size class, kept for reuse when released.
// A training step or a prefill asks for the same sizes every time; fresh pages from the system would be
// zeroed and faulted in each step (measured: half the time of a small training step).
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace ssm {

// Aligned to 64 bytes, to 2 MiB and with huge pages asked for when large. Throws Error (io) when out of
// memory.
std::byte* allocate_aligned(size_t bytes);
void free_aligned(std::byte* p, size_t bytes) noexcept;

class Allocator {
public:
    Allocator() = default;
    Allocator(const Allocator&) = delete;
    Allocator& operator=(const Allocator&) = delete;
    ~Allocator();

    // A block of at least `bytes`; `capacity` receives its size class. Content is undefined.
    std::byte* take(size_t bytes, size_t& capacity);
    void give(std::byte* p, size_t capacity) noexcept;

    size_t bytes_in_use() const;
    size_t peak_bytes() const;

private:
    mutable std::mutex mutex_;
    std::map<size_t, std::vector<std::byte*>> free_;
    size_t in_use_ = 0, peak_ = 0;
};

}  // namespace ssm
