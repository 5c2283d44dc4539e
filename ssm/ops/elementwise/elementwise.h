// Elementwise functions; one folder, because each is a line of mathematics.
//
//   neg_exp   y = -exp(x)           A = -exp(A_log)
//   silu      y = x sigmoid(x)
//   softplus  y = log(1 + exp(x))
//   add       y = a + b
//   multiply  y = a b
//   cast      y = x in another type
//
// Shapes     [t d], rows may be strided; f32 unless said. `y` may alias an input.
// Numerics   rel. error <= 1e-6 each. Cost: bandwidth bound.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

void neg_exp(const Exec& ex, View<const float, 2> x, View<float, 2> y);
void neg_exp_backward(const Exec& ex, View<const float, 2> y, View<const float, 2> grad_y,
                      View<float, 2> grad_x);

void silu(const Exec& ex, View<const float, 2> x, View<float, 2> y);
void silu_backward(const Exec& ex, View<const float, 2> x, View<const float, 2> grad_y,
                   View<float, 2> grad_x);

void softplus(const Exec& ex, View<const float, 2> x, View<float, 2> y);
void softplus_backward(const Exec& ex, View<const float, 2> x, View<const float, 2> grad_y,
                       View<float, 2> grad_x);

// y = a + b; the gradient of each summand is grad_y: accumulate(grad_y, grad_a).
void add(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> y);

void multiply(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> y);
void multiply_backward(const Exec& ex, View<const float, 2> a, View<const float, 2> b,
                       View<const float, 2> grad_y, View<float, 2> grad_a, View<float, 2> grad_b);

// y += scale x, added in f32 and rounded to Y; X and Y are float or bf16.
template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale = 1.0f);

// f32 -> bf16 (to nearest even), bf16 -> f32, and equal types (a copy).
template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y);

}  // namespace ssm
