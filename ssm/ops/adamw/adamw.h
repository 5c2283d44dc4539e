// AdamW, one parameter, in place:
//
//   g = grad_scale * grad
//   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//   p = p - lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay p)
//
// Source     Loshchilov & Hutter 2019, algorithm 2 with the decay scaled by lr (as PyTorch's AdamW).
// Shapes     param, grad, m, v: [count] f32.   step counts from 1.
// Numerics   rel. L2 error of one step <= 1e-6. Cost: 28 bytes per parameter, bandwidth bound.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

struct AdamWOptions {
    float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
    int64_t step = 1;
    float grad_scale = 1.0f;  // gradient clipping and accumulation
};

void adamw_step(const Exec& ex, View<float, 1> param, View<const float, 1> grad, View<float, 1> m,
                View<float, 1> v, const AdamWOptions& options);

// Sum of squares in f64; blocks of fixed size are summed in a fixed order, so the result does not depend on
// threads. On a GPU it waits for the device: not for a graph of a step.
double squared_norm(const Exec& ex, View<const float, 1> x);

}  // namespace ssm
