// Causal depthwise convolution over time, with its activation.
//
//   y[t,d] = act(bias[d] + sum_{j<k} weight[d,j] x[t-k+1+j, d])      weight[d,k-1] meets the current token
//
// Rows before a sequence's start come from initial_state [s k-1 d] (the last k-1 inputs, oldest first) or are
// zero.
//
// Source     Gu & Dao 2023 (Mamba), section 3.4; PyTorch Conv1d(groups = d) is this cross-correlation.
// Shapes     x, y: [t d] of T (f32 or bf16), rows may be strided   weight: [d k] f32
//            bias: [d] f32 or absent   cu_seqlens: [s+1]   initial_state, final_state: [s k-1 d] of T.
//            `y` must not alias `x`.
// Numerics   sums in f32; rel. L2 error vs f64 <= 1e-6 (f32), 5e-3 (bf16).
// Cost       2k + 12 FLOP, 2 sizeof(T) bytes per element: bandwidth bound.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/view.h"
#include "ssm/ops/sequences.h"

namespace ssm {

enum class Activation { none, silu };

template <class T>
struct CausalConv1dInputs {
    View<const T, 2> x;              // [t d]
    View<const float, 2> weight;     // [d k]
    View<const float, 1> bias;       // [d] or absent
    CuSeqlens cu_seqlens;            // [s+1]
    View<const T, 3> initial_state;  // [s k-1 d] or absent (zero)
    Activation activation = Activation::silu;
    Slots slots = {};  // the step: [s], rows of `state`, or absent
};

// y and, where present, final_state: the last k-1 inputs of each sequence (those of initial_state where the
// sequence is shorter). final_state may alias initial_state.
template <class T>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state);

// Gradients: of x of x's type, the others f32. All are added to (x: unless `set_x` asks for it to be written;
// bf16 is added in f32 and rounded); absent ones are not computed.
template <class T>
struct CausalConv1dGradients {
    View<T, 2> x;
    View<float, 2> weight;
    View<float, 1> bias;
    View<float, 3> initial_state;
    bool set_x = false;
};

// The gradients of sum(grad_y * y) + sum(grad_final_state * final_state); grad_final_state may be absent. T
// is f32, on a GPU bf16 too.
template <class T>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<T>& in, View<const T, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<T>& grad);

// One token of each of s sequences: in.x is [s d]; in.cu_seqlens and in.initial_state are ignored. `state`
// [s k-1 d], with slots [any k-1 d], is shifted in place. Here `y` may be `x`.
template <class T>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y);

}  // namespace ssm
