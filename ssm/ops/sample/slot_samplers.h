// Samplers of sequences in slots, on the device that computes the logits: every slot has its options, its
// count of draws and the set of ids it has seen, and chooses as a Sampler (sample.h) with the same history
// would.
//
// GPU        a block for each row; nothing waits, nothing is copied to the host. Weights are summed as
//            integers (units of 2^-40 of the largest), so the choice does not depend on timing; it may
//            differ from the CPU's where two cumulative sums are within rounding of the draw. Where the CPU
//            throws because of NaN, inf or nothing but -inf, the id is -1.
// Cost       greedy: the logits read once. Else 4 to 13 passes over them, from L2.
#pragma once

#include <vector>

#include "ssm/core/tensor.h"
#include "ssm/ops/sample/sample.h"
#include "ssm/ops/sequences.h"

namespace ssm {

class SlotSamplers {
public:
    // All greedy at first. Logits have at least `valid` columns; those beyond are never chosen.
    SlotSamplers(const Exec& ex, int64_t slots, int64_t valid);

    // From now on the slot chooses with these options, as after `draws` draws, having seen `history`. Throws
    // like Sampler and Sampler::sample.
    void set(const Exec& ex, int64_t slot, const SamplerOptions& options, uint64_t draws,
             std::span<const int32_t> history);
    // More ids for the slot's history.
    void saw(const Exec& ex, int64_t slot, std::span<const int32_t> ids);
    // Waits for the device.
    uint64_t draws(int64_t slot) const;

    // ids[i] = the next id of slot slots[i] by row i of logits [b v]. With `seen_before`, ids[i] is first
    // added to what the slot has seen.
    void sample(const Exec& ex, View<const float, 2> logits, Slots slots, View<int32_t, 1> ids,
                bool seen_before) const;

    // As it lies in the device's memory.
    struct Slot {
        float temperature = 0.0f, top_p = 1.0f, min_p = 0.0f, repetition_penalty = 1.0f;
        int32_t top_k = 0, unused = 0;
        uint64_t seed = 0, draws = 0;
    };

private:
    struct OnHost {
        std::vector<Sampler> samplers;
        std::vector<std::vector<int32_t>> histories;
    };
    int64_t slots_, valid_;
    Tensor state_;                  // [slots sizeof(Slot)] u8
    Tensor seen_;                   // [slots words] u32: a bit an id
    std::shared_ptr<OnHost> host_;  // instead, on the CPU
};

}  // namespace ssm
