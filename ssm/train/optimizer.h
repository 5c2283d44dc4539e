// AdamW (ops/adamw) over all parameters of a model, where these are, and its state on disk.
//
// Parameters whose `weight_decay` is false (norms, biases, A_log, D, dt_bias) are not decayed; embeddings
// and every matrix are, as in Mamba's training.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/transfer.h"
#include "ssm/train/trainable.h"

namespace ssm {

class AdamWTable;

struct OptimizerOptions {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    double clip = 1.0;  // largest global norm of the gradients; 0: any
};

class Optimizer {
public:
    // Throws when a parameter is not dense f32 or two have one name.
    Optimizer(Exec exec, std::vector<TrainedParameter> parameters, OptimizerOptions options);
    ~Optimizer();

    const std::vector<TrainedParameter>& parameters() const { return parameters_; }
    void zero_gradients() const;

    // A step in three parts. set_rate() sends what changes from step to step; `step` counts from 1.
    void set_rate(int64_t step, double learning_rate);
    // Norm of the gradients, clipping, AdamW, gradients to zero where the model does not set them; where the
    // norm is not finite the parameters stay as they are. Waits for nothing: on a GPU it may be part of a
    // captured graph.
    void step();
    // What the step left, after the next request(): the loss that was put into loss(), and the norm.
    struct Status {
        double loss = 0, norm = 0;
    };
    void request() { status_.request(); }
    Status status();
    Tensor loss() const { return status_.tensor().rows(0, 1); }  // [1], for Trainable::add_gradients
    // On the CPU, after a step whose norm was not finite: the first parameter, in the model's order, whose
    // gradient had a NaN or Inf.
    const TrainedParameter* broken_gradient() const { return broken_; }

    // What the model computes with, from `value`, after these were loaded.
    void round_parameters() const;

    // "m.NAME" and "v.NAME" of every parameter, safetensors.
    void save(const std::filesystem::path& file) const;
    void load(const std::filesystem::path& file);

private:
    Exec exec_;
    std::vector<TrainedParameter> parameters_;
    OptimizerOptions options_;
    std::vector<Tensor> m_, v_;
    std::unique_ptr<AdamWTable> table_;
    HostInput rates_;
    HostOutput status_;  // loss, norm
    const TrainedParameter* broken_ = nullptr;
};

}  // namespace ssm
