// What a backend of rms_norm provides. Private to ssm/ops/rms_norm: arguments are already checked.
#pragma once

#include "ssm/ops/rms_norm/rms_norm.h"

namespace ssm {

template <class X, class Y>
struct RmsNormCall {
    View<const float, 2> residual;  // [t d] or absent: then x alone is normalised
    RmsNormInputs<X, Y> in;
    View<float, 2> residual_out;  // [t d], present with `residual`
    View<Y, 2> y;                 // [t d]
    View<float, 2> rstd;          // [t groups] or absent
    RmsNormOptions options;
};

template <class X, class Y>
struct RmsNormBackwardCall {
    RmsNormInputs<X, Y> in;
    View<const float, 2> rstd;  // [t groups]
    View<const Y, 2> grad_y;    // [t d]
    RmsNormGradients<X, Y> grad;
    RmsNormOptions options;
};

namespace cpu {

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormCall<X, Y>& call);
void rms_norm_backward(const Exec& ex, const RmsNormBackwardCall<float, float>& call);

}  // namespace cpu

namespace cuda {

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormCall<X, Y>& call);
template <class X, class Y>
void rms_norm_backward(const Exec& ex, const RmsNormBackwardCall<X, Y>& call);

}  // namespace cuda
}  // namespace ssm
