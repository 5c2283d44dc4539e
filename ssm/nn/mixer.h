// Mixer: what a block does between its norm and its residual add. A model is a list of these; a hybrid is a
// list of different ones.
#pragma once

#include <memory>
#include <string>

#include "ssm/autograd/tape.h"
#include "ssm/nn/parameter.h"

namespace ssm {

// The state that a mixer carries from token to token, for s sequences at once.
struct MixerState {
    virtual ~MixerState() = default;
    // Every tensor [s ...] by name, to save, load, copy and count.
    virtual void visit(const std::string& prefix,
                       const std::function<void(const std::string&, Tensor&)>& f) = 0;
};

// Of the numbers a state holds: a convolution's last inputs, and what the recurrence sums up. bf16 sums are
// for steps on a GPU alone.
struct StateTypes {
    DType activation = DType::f32, sums = DType::f32;
};

// The norm before a mixer.
struct BlockNorm {
    View<const float, 1> weight;
    float eps = 1e-5f;
};

struct Mixer {
    virtual ~Mixer() = default;
    // u [t e] -> [t e]. With a state the sequences continue from it and leave their end there; without one
    // they start from zero. Rows split into sequences by ctx.cu_seqlens; empty means one token of each (a
    // step).
    virtual Var forward(Ctx& ctx, const Var& u, MixerState* state) = 0;
    // A step of the whole block: residual [t e] f32 += mixer(norm(residual)), one token of each sequence, the
    // state's rows by ctx.slots. `next`: the weight that is read first after the block, which may be brought
    // nearer. Inference only.
    virtual void step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, MixerState& state,
                      const Tensor& next) = 0;
    // The weight that a step reads first.
    virtual const Tensor& first_weight() const = 0;
    // A zero state for s sequences on ex's device; nullptr for a mixer without memory (an MLP).
    virtual std::unique_ptr<MixerState> new_state(const Exec& ex, int64_t s,
                                                  const StateTypes& types) const = 0;
    virtual void visit(const std::string& prefix, const ParameterVisitor& f) = 0;
};

}  // namespace ssm
