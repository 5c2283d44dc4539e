// Decoder: many sequences being continued at once, one token of each a step. Their states lie in slots of a
// pool; a step names the slots it advances. On a GPU a step is one launch of a graph, captured at the first
// step of its size (the batch padded to 1, 2, 4, 8, 12, 16, 24, 32, 48, ...), and the ids chosen by one step
// are fed to the next without the host waiting for them.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <vector>

#include "ssm/core/graph.h"
#include "ssm/models/language_model.h"
#include "ssm/ops/sample/slot_samplers.h"

namespace ssm {

class Decoder {
public:
    // `model` lies on ex's device; both must outlive the decoder. Between steps the recurrences' states are
    // kept as `states`: bf16, on a GPU alone, is half the memory and the bytes that bound a step of many
    // sequences, and each step then rounds what it sums up in f32 (docs/decisions/0007). read(), save() and
    // load() are in f32.
    Decoder(const Exec& ex, LanguageModel& model, int64_t slots, DType states = DType::f32);

    int64_t slots() const { return slots_; }
    // Forgets what a slot has read: the zero state.
    void clear(int64_t slot);
    // Reads tokens into a slot in chunks of kPrefillChunk, from where it is; logits() are then of the last
    // one, in one row. Throws Error(invalid_argument) for an id outside the vocabulary before anything
    // changes. No ids: nothing happens.
    void read(int64_t slot, std::span<const int32_t> ids);
    // One token of each of the slots, all different; logits() has their rows in this order.
    void step(std::span<const int32_t> slots, std::span<const int32_t> ids);
    // The same slots again, fed with the ids that the last step or read chose.
    void step();

    // How ids are chosen from the logits' first `valid` columns (the same for all slots): greedily, until a
    // slot is given a sampler, which goes on as after `draws` draws and having seen `history`.
    void set_valid(int64_t valid);
    void set_sampler(int64_t slot, const SamplerOptions& options, uint64_t draws,
                     std::span<const int32_t> history);
    bool has_samplers() const { return samplers_.has_value(); }
    // Chooses once more from the last logits: after set_sampler.
    void choose_again();

    // Of the last step or read: [slots v] f32 on the device, valid until the next one.
    Tensor logits() const { return logits_; }
    // The ids chosen by the last step or read, in the order of its slots. Waits for the device. Throws
    // Error(numeric) where the logits allow no choice (NaN, say).
    std::vector<int32_t> next_ids() const;

    // One slot's state: copied out to, or in from, a state for one sequence. With the `logits` [1 v] of its
    // last token the slot is as if it had just been read.
    void save(int64_t slot, ModelState& one) const;
    void load(int64_t slot, ModelState& one, const Tensor& logits = {});
    size_t state_bytes_per_slot() const;
    DType states() const { return states_; }

    static constexpr int64_t kPrefillChunk = 512;

private:
    struct Shape {
        Tensor logits;  // [b v]
        Graph graph;
    };
    void require_ids(std::span<const int32_t> ids) const;
    void set_slots(std::span<const int32_t> slots);
    void run(int64_t b);
    void compute(int64_t b, const Tensor& logits);
    void choose(const Tensor& logits, bool fed) const;

    const Exec& exec_;
    Exec own_;  // its memory is that of the graphs
    LanguageModel& model_;
    int64_t slots_, valid_;
    DType states_;
    std::optional<SlotSamplers> samplers_;  // absent: greedy
    mutable ModelState pool_;               // slots, and on a GPU one more: nobody's, for padding
    Tensor ids_, slot_ids_;                 // [slots] i32 on the device: what a step is fed, and where
    std::vector<int32_t> active_;           // slots of the last step or read, without padding
    std::map<int64_t, Shape> shapes_;
    Tensor logits_;
};

}  // namespace ssm
