// Embedding lookup: y[t,:] = weight[ids[t],:].
//
// Shapes     ids: [t] in [0, v) (checked: throws; on a GPU an id outside gives NaN, and no gradient)
//            weight: [v e] f32 or bf16   y: [t e] f32 or bf16.
// Cost       bandwidth bound: e (sizeof(W) + sizeof(Y)) bytes per token.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y);

// grad_weight[ids[t],:] += grad_y[t,:], in the order of t (deterministic on any number of threads).
void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight);

}  // namespace ssm
