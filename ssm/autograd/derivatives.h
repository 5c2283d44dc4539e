// The table: one differentiable function per operator. Each calls the operator and, when the context has a
// tape and an input wants a gradient, records the operator's backward. Shapes and equations: the operator's
// header. The backward lets the result's value go before it takes memory for gradients.
#pragma once

#include "ssm/autograd/tape.h"
#include "ssm/ops/causal_conv1d/causal_conv1d.h"
#include "ssm/ops/linear/linear.h"
#include "ssm/ops/rms_norm/rms_norm.h"
#include "ssm/ops/selective_scan/selective_scan.h"
#include "ssm/ops/ssd/ssd.h"

namespace ssm {

// ids [t] i32, on the context's device -> [t e] f32
Var embedding(Ctx& ctx, const Tensor& ids, const Var& weight);

// x in the activations' type, once for several products; its gradient stays x's, in x's type.
Var rounded(Ctx& ctx, const Var& x);

// [t i] -> [t o] of `out`; `weight` [o i] changes (training). Inference: nn::Linear with its PackedWeight.
Var linear(Ctx& ctx, const Var& x, const Var& weight, const Var& bias, DType out = DType::f32);

// [t d] -> [t d] of `out`; weight and z may be absent.
Var rms_norm(Ctx& ctx, const Var& x, const Var& weight, const Var& z, const RmsNormOptions& options,
             DType out);

// residual + x, and its norm. residual [t d] f32; x may be absent (then residual passes through).
struct Normed {
    Var residual, y;
};
Normed add_rms_norm(Ctx& ctx, const Var& residual, const Var& x, const Var& weight,
                    const RmsNormOptions& options, DType out);

// [t d] -> [t d]. With `state` [s k-1 d] (inference) the convolution starts from it and leaves its end there.
Var causal_conv1d(Ctx& ctx, const Var& x, const Var& weight, const Var& bias, Activation activation,
                  Tensor* state);

// S6. Absent: D, z, delta_bias. With `state` [s d n] (inference) the scan starts from it and leaves its end
// there.
struct SelectiveScanVars {
    Var u, delta, A, B, C, D, z, delta_bias;
};
Var selective_scan(Ctx& ctx, const SelectiveScanVars& in, Tensor* state,
                   const SelectiveScanOptions& options = {});
// Behind the linear function that reads a scan's result y: a GPU need not keep it, because the scan's
// backward pass gives it once more. The linear's gradient of the weight waits for that.
void forget_scanned(Ctx& ctx, const Var& y);

// SSD. x [t h*p], dt [t h], B, C [t g*n] as slices of one projection; A, dt_bias [h]; D [h] or [h*p].
struct SsdVars {
    Var x, dt, A, B, C, D, dt_bias;
};
struct SsdShape {
    int64_t h = 1, p = 1, g = 1, n = 1;
    float dt_min = 0.0f, dt_max = std::numeric_limits<float>::infinity();
};
Var ssd(Ctx& ctx, const SsdVars& in, const SsdShape& shape, Tensor* state, SsdOptions options = {});

// -exp(x), of any shape.
Var neg_exp(Ctx& ctx, const Var& x);

Var silu(Ctx& ctx, const Var& x);
Var softplus(Ctx& ctx, const Var& x);
Var add(Ctx& ctx, const Var& a, const Var& b);
Var multiply(Ctx& ctx, const Var& a, const Var& b);

// sum_t weights[t] nll[t] under softmax(hidden weight^T): a scalar Var [1]. targets [t] i32 and weights [t]
// f32 lie on the context's device; a target < 0 is ignored. With a tape this is its last function: the
// gradient of the sum is 1, and that of `weight` is added at once.
Var linear_cross_entropy(Ctx& ctx, const Var& hidden, const Var& weight, const Tensor& targets,
                         const Tensor& weights);

}  // namespace ssm
