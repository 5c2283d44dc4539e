// Where the trainer's batches come from: a text (sampler.h), a synthetic task (ssm/tasks), whatever can say
// where it stands and be put there again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ssm/ops/sequences.h"

namespace ssm {

// Packed sequences (ops/sequences.h) and what follows each token; a target < 0 does not count.
struct Batch {
    std::vector<int32_t> ids, targets;
    std::vector<int64_t> cu_seqlens;
    int64_t tokens() const { return static_cast<int64_t>(ids.size()); }
    // Targets that count: a batch's weight in a step, and what its mean loss is the mean of.
    int64_t counted() const {
        return std::count_if(targets.begin(), targets.end(), [](int32_t target) { return target >= 0; });
    }
};

// Positions in a batch fit in 32 bits.
inline void require_batch(const char* where, int64_t sequences, int64_t length) {
    require(length >= 1, where, "length must be at least 1 but is {}", length);
    require(sequences >= 1, where, "batch must be at least 1 but is {}", sequences);
    require(sequences <= INT32_MAX / length, where, "a batch of {} x {} tokens is more than {}", sequences,
            length, INT32_MAX);
}

struct SamplerState {
    uint64_t epoch = 0, position = 0;
    bool operator==(const SamplerState&) const = default;
};

// The batches after seek(state()) are those that would have come without it.
class BatchSource {
public:
    virtual ~BatchSource() = default;
    virtual void next(Batch& batch) = 0;
    virtual SamplerState state() const = 0;
    virtual void seek(SamplerState state) = 0;     // throws for a position outside an epoch
    virtual uint64_t epoch_size() const = 0;       // positions in an epoch
    virtual int64_t tokens_per_batch() const = 0;  // the most that next() gives
    // What must be the same when a run is resumed; by name, for the message.
    virtual std::map<std::string, std::string> identity() const = 0;
};

}  // namespace ssm
