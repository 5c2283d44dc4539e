// What the trainer needs of a model: parameters with gradients, a loss, a way onto the disk.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "ssm/core/tensor.h"
#include "ssm/train/batch_source.h"

namespace ssm {

// Value and gradient, f32 of one shape; the tensors share the model's storage for as long as it trains.
struct TrainedParameter {
    std::string name;
    Tensor value, grad;
    bool weight_decay = true;
    Tensor rounded = {};     // in bf16, what the model computes with, where that is not `value` itself
    bool sets_grad = false;  // add_gradients() sets grad, whatever it holds; else adds
};

class Trainable {
public:
    virtual ~Trainable() = default;
    virtual std::vector<TrainedParameter> parameters() = 0;
    // The batches of the next step and what each weighs; on a GPU they are on their way there afterwards.
    virtual void set_batches(std::span<const Batch> batches, std::span<const double> weights) = 0;
    // loss[0] = sum over the batches of weight * mean negative log-likelihood of the targets that count, in
    // nats; adds its gradient to every grad, or sets it (sets_grad). `loss` [1] f32 lies where the gradients
    // do. On a GPU nothing waits, and what is asked of it depends only on how the batches are split into
    // sequences.
    virtual void add_gradients(const Tensor& loss) = 0;
    // The mean of one batch, without gradients.
    virtual double loss(const Batch& batch) = 0;
    // Writes the model, its tensors under the parameters' names, into a folder that exists.
    virtual void save(const std::filesystem::path& folder) = 0;
    // Products and sums that one token costs in a step (6 for each weight it meets); 0: not known.
    virtual double flop_per_token() const { return 0; }
};

}  // namespace ssm
