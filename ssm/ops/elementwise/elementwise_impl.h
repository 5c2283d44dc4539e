// What a backend of the elementwise functions provides. Private to ssm/ops/elementwise: arguments are already
// checked, all views of a call have the same shape.
#pragma once

#include "ssm/ops/elementwise/elementwise.h"

namespace ssm {

enum class Unary { neg_exp, silu, softplus };
enum class Binary { add, multiply };

namespace cpu {

void unary(const Exec& ex, Unary f, View<const float, 2> x, View<float, 2> y);
// grad_x += grad_y f'; `x_or_y` is y for neg_exp, x for the others.
void unary_backward(const Exec& ex, Unary f, View<const float, 2> x_or_y, View<const float, 2> grad_y,
                    View<float, 2> grad_x);
void binary(const Exec& ex, Binary f, View<const float, 2> a, View<const float, 2> b, View<float, 2> y);
// y += x b, and y += scale x.
void accumulate_product(const Exec& ex, View<const float, 2> x, View<const float, 2> b, View<float, 2> y);
template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale);
template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y);

}  // namespace cpu

namespace cuda {

void unary(const Exec& ex, Unary f, View<const float, 2> x, View<float, 2> y);
void unary_backward(const Exec& ex, Unary f, View<const float, 2> x_or_y, View<const float, 2> grad_y,
                    View<float, 2> grad_x);
void binary(const Exec& ex, Binary f, View<const float, 2> a, View<const float, 2> b, View<float, 2> y);
void accumulate_product(const Exec& ex, View<const float, 2> x, View<const float, 2> b, View<float, 2> y);
template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale);
template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y);

}  // namespace cuda
}  // namespace ssm
