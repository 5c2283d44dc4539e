// AdamW (ops/adamw) over all parameters of a model, its state on disk, and the global norm of the gradients:
//
//   norm = sqrt(sum over parameters, elements of grad^2)
//
// Parameters whose `weight_decay` is false (norms, biases, A_log, D, dt_bias) are not decayed; embeddings
// and every matrix are, as in Mamba's training.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/train/trainable.h"

namespace ssm {

class AdamWTable;

struct OptimizerOptions {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

class Optimizer {
public:
    // Throws when a parameter is not dense f32 or two have one name.
    Optimizer(Exec exec, std::vector<TrainedParameter> parameters, OptimizerOptions options);
    ~Optimizer();

    const std::vector<TrainedParameter>& parameters() const { return parameters_; }
    double gradient_norm() const;
    // The first parameter, in the model's order, whose gradient has a NaN or Inf; null when there is none.
    const TrainedParameter* broken_gradient() const;
    void zero_gradients() const;
    // One step with the gradients times `scale`, then zeroes these. `step` counts from 1.
    void step(int64_t step, double learning_rate, double scale) const;

    // "m.NAME" and "v.NAME" of every parameter, safetensors.
    void save(const std::filesystem::path& file) const;
    void load(const std::filesystem::path& file);

private:
    Exec exec_;
    std::vector<TrainedParameter> parameters_;
    OptimizerOptions options_;
    std::vector<Tensor> m_, v_;
    std::unique_ptr<AdamWTable> table_;
};

}  // namespace ssm
