// cu_seqlens for a kernel: in its parameters when there are few, else in device memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "ssm/core/cuda/context.h"

namespace ssm::cuda {

// Passed to a kernel by value.
struct Sequences {
    static constexpr int kFew = 65;
    int64_t count = 0;              // of sequences; offset(0) .. offset(count)
    const int64_t* many = nullptr;  // device memory, or absent
    int64_t few[kFew] = {};

    __host__ __device__ int64_t offset(int64_t i) const { return many != nullptr ? many[i] : few[i]; }
};

// Makes a Sequences; must live until the kernel is launched (device memory is reused in the stream's order).
class SequencesOnDevice {
public:
    SequencesOnDevice(const Exec& ex, std::span<const int64_t> offsets) {
        sequences_.count = static_cast<int64_t>(offsets.size()) - 1;
        if (offsets.size() <= Sequences::kFew) {
            std::copy(offsets.begin(), offsets.end(), sequences_.few);
        } else {
            memory_.emplace(ex, offsets.size());
            ex.allocator->copy_in(memory_->data(), offsets.data(), offsets.size_bytes());
            sequences_.many = memory_->data();
        }
    }
    const Sequences& get() const { return sequences_; }

private:
    Sequences sequences_;
    std::optional<Scratch<int64_t>> memory_;
};

}  // namespace ssm::cuda
