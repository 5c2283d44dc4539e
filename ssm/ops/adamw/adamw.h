// AdamW over all parameters of a model, in place:
//
//   norm  = sqrt(sum over parameters, elements of grad^2)
//   g     = grad min(1, clip / norm)                           clip 0: g = grad
//   m     = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//   p     = p - lr (m / bias1 / (sqrt(v / bias2) + eps) + weight_decay p),   bias_i = 1 - beta_i^step
//   grad  = 0                                                 unless keep_grad
//
// Source     Loshchilov & Hutter 2019, algorithm 2 with the decay scaled by lr (as PyTorch's AdamW).
// Shapes     param, grad, m, v: [count] f32.   step counts from 1.
// Numerics   rel. L2 error of one step <= 1e-6; the sum of squares is f64's, in a fixed order.
// Cost       32 bytes per parameter (28 with keep_grad), 2 more with a rounded copy; norm 4: bandwidth
//            bound. On a GPU one launch (norm: two) for all parameters, no wait; lr, the step's biases and
//            the norm are device memory, so that a captured graph of a step is replayed with new ones.
#pragma once

#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/core/view.h"

namespace ssm {

struct AdamWParameter {
    View<float, 1> param, grad, m, v;
    View<bf16, 1> rounded;  // absent, or receives the new param in bf16
    float weight_decay = 0.0f;
    bool keep_grad = false;  // who makes the next gradient sets it
};

// The parameters of a step, checked; on a GPU with the kernels' list of pieces in its memory. The memory that
// the views name must stay. Cheap to copy.
class AdamWTable {
public:
    AdamWTable(const Exec& ex, std::vector<AdamWParameter> parameters);

    const std::vector<AdamWParameter>& parameters() const { return parameters_; }
    const Tensor& pieces() const { return pieces_; }  // private to the operator: AdamWPiece[piece_count()]
    int64_t piece_count() const { return piece_count_; }

private:
    std::vector<AdamWParameter> parameters_;
    Tensor pieces_;
    int64_t piece_count_ = 0;
};

struct AdamWOptions {
    float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
    float clip = 0.0f;  // 0: gradients are not clipped
};

// norm[0] of the gradients as they are; NaN or Inf where one of them is.
void gradient_norm(const Exec& ex, const AdamWTable& table, View<float, 1> norm);

// rates: {lr, 1 - beta1^step, 1 - beta2^step}. norm: as gradient_norm leaves it, or any number to clip by.
// When norm[0] is not finite nothing changes but the gradients, which are set to zero as always.
void adamw_step(const Exec& ex, const AdamWTable& table, const AdamWOptions& options,
                View<const float, 1> rates, View<const float, 1> norm);

}  // namespace ssm
