// A projection of a step with what stands before and after it in a layer: the norm of its input; the residual
// add, or the convolution of some of its outputs.
//
//   v      = x, or rms_norm(x) with weight and gate (rms_norm.h)
//   p[t,o] = sum_i v[t,i] weight[o,i] + bias[o]
//   y      = p;   y + p (end.add);   or p with columns first .. first + d through a causal convolution's step
//            (end.conv: causal_conv1d.h, d channels, its state shifted in place)
//
// Source     the layers of Gu & Dao 2023 and Dao & Gu 2024, one token of each of t sequences.
// Shapes     x, z: [t i]   norm_weight: [i] f32 or absent   weight: [o i]   bias: [o] f32 or absent
//            y: [t o]. Rows may be strided.
// Types      weight f32: x f32. weight bf16: x f32 or bf16. y f32 or, with a bf16 weight, bf16; f32
//            where it is added to. z has the weight's type, and x's. The convolution's state has y's type.
// Numerics   f32 accumulation; v is rounded to the weight's type, before or after its division by the norm.
//            rel. L2 error vs f64 <= 1e-5 (f32), 1e-2 (bf16).
// Cost       t small: bound by reading the weight once: floor = o i sizeof(weight) / bandwidth.
// GPU        One kernel, which fetches its weights while the kernel before it ends (so that one must not have
//            written them): t <= 8; with a bf16 weight t <= 4, 2 if it is large_on_gpu, 512 if o i <= 160 x
//            4096 and x is bf16 and not normed. Otherwise, and on the CPU, the operators one after another;
//            in a captured graph end.next is then brought to L2 beside the product (prefetch.h).
#pragma once

#include <optional>

#include "ssm/ops/causal_conv1d/causal_conv1d.h"
#include "ssm/ops/linear/linear.h"
#include "ssm/ops/rms_norm/rms_norm.h"

namespace ssm {

struct NormLinearInputs {
    Tensor x = {};                            // [t i]
    std::optional<RmsNormOptions> norm = {};  // absent: x as it is
    View<const float, 1> norm_weight = {};    // [i] or absent
    Tensor z = {};                            // [t i]; present exactly when gated
    PackedWeight weight = {};                 // [o i]
    View<const float, 1> bias = {};           // [o] or absent
};

struct ConvStep {
    int64_t first = 0;                 // column of y
    View<const float, 2> weight = {};  // [d k]
    View<const float, 1> bias = {};    // [d] or absent
    Activation activation = Activation::silu;
    Tensor state = {};  // [t k-1 d], with slots [any k-1 d]
    Slots slots = {};   // [t] or absent
};

struct NormLinearEnd {
    bool add = false;
    Tensor next = {};  // a weight that will be read after this one, or absent
    std::optional<ConvStep> conv = {};
    // For a large bf16 weight and up to 2 rows on a GPU: the next kernel may begin once this one has asked
    // for its weight. Without it, at once: better where that one has much to ask for (ssd_step's states).
    bool ask_first = false;
};

void norm_linear(const Exec& ex, const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end = {});

}  // namespace ssm
