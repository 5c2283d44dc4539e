// Cross-entropy of a linear head, fused: the [t v] logits are never held, only a tile of tokens at a time.
//
//   logits[t,:] = hidden[t,:] weight^T,   nll[t] = logsumexp(logits[t,:]) - logits[t, targets[t]]
//
// A target < 0 is ignored: nll 0, no gradient. One >= v throws; on a GPU, where targets, nll and grad_nll are
// device memory, it gives nll NaN and no gradient.
// Shapes     hidden: [t e]   weight: [v e] (linear.h's types)   targets: [t]   nll, grad_nll: [t] f32.
// Numerics   logsumexp in f32 with the maximum subtracted; rel. L2 error vs f64 <= 1e-5 (f32).
// Cost       2 t e v FLOP forward; 6 t e v with gradients. Compute bound. Extra memory: one tile, <= 32 MiB.
// On a GPU <= 1 GiB and, with ex.matmul == bf16, half of that again and bf16 copies of hidden and weight.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/core/view.h"
#include "ssm/ops/linear/linear.h"

namespace ssm {

void linear_cross_entropy(const Exec& ex, const Tensor& hidden, const PackedWeight& weight,
                          View<const int32_t, 1> targets, View<float, 1> nll);

// nll, and the gradients of sum_t grad_nll[t] nll[t] added to grad_hidden [t e] and grad_weight [v e] (either
// may be absent). One pass: the logits of a tile serve the loss and both gradients. Training, so hidden and
// weight are f32.
void linear_cross_entropy_backward(const Exec& ex, View<const float, 2> hidden, View<const float, 2> weight,
                                   View<const int32_t, 1> targets, View<const float, 1> grad_nll,
                                   View<float, 1> nll, View<float, 2> grad_hidden,
                                   View<float, 2> grad_weight);

}  // namespace ssm
