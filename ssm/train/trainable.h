// What the trainer needs of a model: parameters with gradients, a loss, a way onto the disk.
#pragma once

#include <filesystem>
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
};

class Trainable {
public:
    virtual ~Trainable() = default;
    virtual std::vector<TrainedParameter> parameters() = 0;
    // Mean negative log-likelihood of the batch's targets that count, in nats; adds `weight` times its
    // gradient to every grad.
    virtual double add_gradients(const Batch& batch, double weight) = 0;
    // The same without gradients.
    virtual double loss(const Batch& batch) = 0;
    // Writes the model, its tensors under the parameters' names, into a folder that exists.
    virtual void save(const std::filesystem::path& folder) = 0;
};

}  // namespace ssm
