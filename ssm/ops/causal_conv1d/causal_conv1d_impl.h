// What a device must provide for the causal convolution. Private: the front has checked every argument.
#pragma once

#include "ssm/core/dtype.h"
#include "ssm/ops/causal_conv1d/causal_conv1d.h"

namespace ssm {
// T = float alone goes backward on the CPU.
namespace cpu {

template <class T>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state);

template <class T>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<T>& in, View<const T, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<T>& grad);

template <class T>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y);

}  // namespace cpu

namespace cuda {

template <class T>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state);

template <class T>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<T>& in, View<const T, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<T>& grad);

template <class T>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y);

}  // namespace cuda
}  // namespace ssm
