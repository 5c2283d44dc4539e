// A causal convolution's step, in place, and a projection of what comes out: between in_proj and the scan of
// a Mamba-1 layer, for one token of each of t sequences.
//
//   x[t,i] <- act(conv.bias[i] + sum_{j<k} conv.weight[i,j] [state; x][t,j,i])     the state is shifted
//   y[t,o]  = sum_i x[t,i] weight[o,i]
//
// Source     Gu & Dao 2023 (Mamba), section 3.4.
// Shapes     x: [t d] f32 or bf16, rows may be strided   conv.weight: [d k] f32   conv.bias: [d] f32 or
// absent
//            conv.state: [t k-1 d] of x's type, with slots [any k-1 d]   weight: [o d] f32 or bf16
//            y: [t o] f32. conv.first is 0: the convolution is of all of x.
// Numerics   f32 accumulation; x is rounded to its type before the product. rel. L2 error vs f64 <= 1e-5
//            (f32), 1e-2 (bf16).
// Cost       t small: 2 k t d of x's type, and the weight once: floor = these bytes / bandwidth.
// GPU        bf16, k = 4, o <= 192 and d a multiple of 256: one kernel, which fetches its weights while the
//            kernel before it ends (they must not have been written by that one). Otherwise, and on the CPU,
//            causal_conv1d_step and a product.
#pragma once

#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm {

void conv_linear(const Exec& ex, const Tensor& x, const ConvStep& conv, const PackedWeight& weight,
                 const Tensor& y);

}  // namespace ssm
