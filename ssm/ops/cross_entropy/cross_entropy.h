// Cross-entropy of a linear head, fused: the [t v] logits are never held, only a tile of tokens at a time.
//
//   logits[t,:] = hidden[t,:] weight^T,   nll[t] = logsumexp(logits[t,:]) - logits[t, targets[t]]
//
// A target < 0 is ignored: nll 0, no gradient. One >= v throws; on a GPU, where targets, nll and grad_nll are
// device memory, it gives nll NaN and no gradient.
// Shapes     hidden: [t e]   weight: [v e] (linear.h's types)   targets: [t]   nll, grad_nll: [t] f32.
// Numerics   logsumexp in f32 with the maximum subtracted; rel. L2 error vs f64 <= 1e-5 (f32).
// Cost       2 t e v FLOP forward; 6 t e v with gradients. Compute bound. Extra memory: one tile, <= 32 MiB.
// On a GPU <= 512 MiB and copies of what must be rounded: hidden or weight in f32 when the products are bf16.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/core/view.h"
#include "ssm/ops/linear/linear.h"

namespace ssm {

void linear_cross_entropy(const Exec& ex, const Tensor& hidden, const PackedWeight& weight,
                          View<const int32_t, 1> targets, View<float, 1> nll);

// nll, and the gradients of sum_t grad_nll[t] nll[t] added to grad_hidden [t e] and grad_weight [v e], or
// written there (not with t = 0), where `set` names it; either may be absent. One pass: the logits of a tile
// serve the loss and both gradients. Types: grad_hidden has hidden's, grad_weight is f32. On the CPU all are
// f32. On a GPU hidden and weight are f32 or bf16, in any mix; the products are bf16 when the weight is or
// ex.matmul says so, the logits and the softmax f32.
struct LinearCrossEntropySet {
    bool hidden = false, weight = false;
};
void linear_cross_entropy_backward(const Exec& ex, const Tensor& hidden, const Tensor& weight,
                                   View<const int32_t, 1> targets, View<const float, 1> grad_nll,
                                   View<float, 1> nll, const Tensor& grad_hidden, View<float, 2> grad_weight,
                                   LinearCrossEntropySet set = {});

// mean[0] = the sum of nll, in f64 and a fixed order, over `counted`; where nll lies, without a wait.
void mean_nll(const Exec& ex, View<const float, 1> nll, double counted, View<float, 1> mean);

}  // namespace ssm
