// A caching allocator: aligned blocks by size class, kept for reuse when released.
// A training step or a prefill asks for the same sizes every time; fresh pages from the system would be
// zeroed and faulted in each step (measured: half the time of a small training step), and a GPU's driver
// would wait for the device at each. Large blocks of a GPU's memory are pieces of segments instead.
#pragma once

#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ssm/core/device.h"
#include "ssm/core/segments.h"

namespace ssm {

// Host memory, aligned to 64 bytes, to 2 MiB and with huge pages asked for when large. Throws Error (io) when
// out of memory.
std::byte* allocate_aligned(size_t bytes);
void free_aligned(std::byte* p, size_t bytes) noexcept;

// Of the host's memory; derived: of a GPU's (core/cuda/context.h). What a block is given back for may still
// run on the device: the next owner's work comes after it in the same stream.
class Allocator {
public:
    Allocator() = default;
    Allocator(const Allocator&) = delete;
    Allocator& operator=(const Allocator&) = delete;
    virtual ~Allocator();

    // A block of at least `bytes`; `capacity` receives its size class. Content is undefined.
    std::byte* take(size_t bytes, size_t& capacity);
    void give(std::byte* p, size_t capacity) noexcept;

    // Every block that is taken after start_withholding() and back at stop_withholding() is handed to the
    // caller instead of the next who asks, until give_back(): a captured graph writes it whenever it runs.
    struct Block {
        std::byte* data;
        size_t capacity;
    };
    void start_withholding();
    std::vector<Block> stop_withholding();
    void give_back(std::vector<Block> blocks) noexcept;

    size_t bytes_in_use() const;
    size_t peak_bytes() const;      // with what graphs hold
    size_t reserved_bytes() const;  // asked of the system and kept

    // Where the blocks are, and moving bytes there: on a GPU in the order of its stream.
    virtual Device device() const { return Device::cpu; }
    virtual void zero(void* p, size_t bytes);
    virtual void copy(void* to, const void* from, size_t bytes);      // both here
    virtual void copy_in(void* to, const void* from, size_t bytes);   // from the host
    virtual void copy_out(void* to, const void* from, size_t bytes);  // to the host; waits until it is there

protected:
    virtual std::byte* allocate(size_t bytes) { return allocate_aligned(bytes); }
    virtual void release(std::byte* p, size_t bytes) noexcept { free_aligned(p, bytes); }
    // Blocks of at least this size are pieces of segments. On the host none: a block that begins with a huge
    // page is faster.
    virtual size_t smallest_piece() const { return std::numeric_limits<size_t>::max(); }
    // Releases what is kept. A derived class calls it in its destructor.
    void trim() noexcept;

private:
    std::byte* take_kept(size_t capacity);  // nullptr where nothing fits

    mutable std::mutex mutex_;
    std::map<size_t, std::vector<std::byte*>> free_;
    Segments segments_;
    std::vector<Block> taken_;  // while withholding
    bool withholding_ = false;
    size_t in_use_ = 0, peak_ = 0, reserved_ = 0;
};

}  // namespace ssm
