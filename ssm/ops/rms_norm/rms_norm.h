// Root-mean-square normalisation, in the variants of the architectures, with the residual add fused.
//
//   v        = x                      gate none or after
//   v        = x silu(z)              gate before
//   v^[t,d]  = v[t,d] / sqrt(mean over d's group of v[t,:]^2 + eps)
//   y[t,d]   = v^[t,d] w[d]           w = weight, 1 + weight (unit_offset), or 1 (weight absent)
//   y[t,d]  *= silu(z[t,d])           gate after
//
// Source     Zhang & Sennrich 2019; gated and grouped: Dao & Gu 2024 (Mamba-2).
// Shapes     x: [t d] of X   z, y: [t d] of Y   weight: [d] f32   rstd: [t groups] f32.  Rows may be strided.
//            (X, Y): (f32, f32), (f32, bf16), (bf16, bf16). `y` may alias `x`.
// Numerics   sums in f32; rel. L2 error vs f64 <= 2e-6 (f32), 5e-3 (bf16).
// Cost       ~4 FLOP, sizeof(X) + sizeof(Y) bytes per element: bandwidth bound.
#pragma once

#include <type_traits>

#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

struct RmsNormOptions {
    float eps = 1e-5f;
    int64_t groups = 1;  // divides d
    bool unit_offset = false;
    enum class Gate { none, before, after } gate = Gate::none;
};

template <class X, class Y>
struct RmsNormInputs {
    View<const X, 2> x;           // [t d]
    View<const float, 1> weight;  // [d] or absent
    View<const Y, 2> z;           // [t d]; present exactly when gated
};

// y and, where present, rstd = 1 / sqrt(mean v^2 + eps), which the backward pass needs.
template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormInputs<X, Y>& in, View<Y, 2> y, View<float, 2> rstd,
              const RmsNormOptions& options = {});

// residual_out = residual + x;  y = rms_norm(residual_out) (gate none). residual_out may alias residual.
template <class X, class Y>
void add_rms_norm(const Exec& ex, View<const float, 2> residual, View<const X, 2> x,
                  View<const float, 1> weight, View<float, 2> residual_out, View<Y, 2> y, View<float, 2> rstd,
                  const RmsNormOptions& options = {});

// Gradients, each of its tensor's type, the weight's f32; added to (in f32, then rounded) unless set_* says
// that they are written; absent ones are not computed. The gradient of add_rms_norm is this one with x =
// residual_out: the finished gradient of x goes to both summands. `branch`, if present, is written: a copy of
// the finished gradient of x (which must be present) in Y, what add_rms_norm's x receives.
// (X, Y): (f32, f32); on a GPU also (f32, bf16), (bf16, bf16).
template <class X, class Y>
struct RmsNormGradients {
    View<X, 2> x;
    View<float, 1> weight;
    View<Y, 2> z;
    View<Y, 2> branch = {};
    bool set_x = false, set_z = false;
};
template <class X, class Y>
void rms_norm_backward(const Exec& ex, const RmsNormInputs<X, Y>& in, View<const float, 2> rstd,
                       std::type_identity_t<View<const Y, 2>> grad_y,
                       const std::type_identity_t<RmsNormGradients<X, Y>>& grad,
                       const RmsNormOptions& options = {});

}  // namespace ssm
