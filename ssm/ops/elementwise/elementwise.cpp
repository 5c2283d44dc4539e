#include "ssm/ops/elementwise/elementwise.h"

#include "ssm/core/dtype.h"
#include "ssm/ops/elementwise/elementwise_impl.h"

namespace ssm {
namespace {

template <class X>
void require_input(std::string_view op, const Exec& ex, std::string_view name, const View<X, 2>& x) {
    require_device(op, ex);
    require(static_cast<bool>(x), op, "`{}` is absent", name);
}

void unary(std::string_view op, const Exec& ex, Unary f, View<const float, 2> x, View<float, 2> y) {
    require_input(op, ex, "x", x);
    require_shape(op, "y", "t d", y, x.shape);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::unary(ex, f, x, y);
    }
    cpu::unary(ex, f, x, y);
}

void unary_backward(std::string_view op, const Exec& ex, Unary f, std::string_view name,
                    View<const float, 2> x_or_y, View<const float, 2> grad_y, View<float, 2> grad_x) {
    require_input(op, ex, name, x_or_y);
    require_shape(op, "grad_y", "t d", grad_y, x_or_y.shape);
    require_shape(op, "grad_x", "t d", grad_x, x_or_y.shape);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::unary_backward(ex, f, x_or_y, grad_y, grad_x);
    }
    cpu::unary_backward(ex, f, x_or_y, grad_y, grad_x);
}

void binary(std::string_view op, const Exec& ex, Binary f, View<const float, 2> a, View<const float, 2> b,
            View<float, 2> y) {
    require_input(op, ex, "a", a);
    require_shape(op, "b", "t d", b, a.shape);
    require_shape(op, "y", "t d", y, a.shape);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::binary(ex, f, a, b, y);
    }
    cpu::binary(ex, f, a, b, y);
}

void accumulate_product(const Exec& ex, View<const float, 2> x, View<const float, 2> b, View<float, 2> y) {
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::accumulate_product(ex, x, b, y);
    }
    cpu::accumulate_product(ex, x, b, y);
}

}  // namespace

void neg_exp(const Exec& ex, View<const float, 2> x, View<float, 2> y) {
    unary("neg_exp", ex, Unary::neg_exp, x, y);
}
void neg_exp_backward(const Exec& ex, View<const float, 2> y, View<const float, 2> grad_y,
                      View<float, 2> grad_x) {
    unary_backward("neg_exp_backward", ex, Unary::neg_exp, "y", y, grad_y, grad_x);
}

void silu(const Exec& ex, View<const float, 2> x, View<float, 2> y) { unary("silu", ex, Unary::silu, x, y); }
void silu_backward(const Exec& ex, View<const float, 2> x, View<const float, 2> grad_y,
                   View<float, 2> grad_x) {
    unary_backward("silu_backward", ex, Unary::silu, "x", x, grad_y, grad_x);
}

void softplus(const Exec& ex, View<const float, 2> x, View<float, 2> y) {
    unary("softplus", ex, Unary::softplus, x, y);
}
void softplus_backward(const Exec& ex, View<const float, 2> x, View<const float, 2> grad_y,
                       View<float, 2> grad_x) {
    unary_backward("softplus_backward", ex, Unary::softplus, "x", x, grad_y, grad_x);
}

void add(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> y) {
    binary("add", ex, Binary::add, a, b, y);
}

void multiply(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> y) {
    binary("multiply", ex, Binary::multiply, a, b, y);
}
void multiply_backward(const Exec& ex, View<const float, 2> a, View<const float, 2> b,
                       View<const float, 2> grad_y, View<float, 2> grad_a, View<float, 2> grad_b) {
    constexpr std::string_view op = "multiply_backward";
    require_input(op, ex, "a", a);
    require_shape(op, "b", "t d", b, a.shape);
    require_shape(op, "grad_y", "t d", grad_y, a.shape);
    require_shape_if(op, "grad_a", "t d", grad_a, a.shape);
    require_shape_if(op, "grad_b", "t d", grad_b, a.shape);
    if (grad_a) accumulate_product(ex, grad_y, b, grad_a);
    if (grad_b) accumulate_product(ex, grad_y, a, grad_b);
}

template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale) {
    require_input("accumulate", ex, "x", x);
    require_shape("accumulate", "y", "t d", y, x.shape);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::accumulate(ex, x, y, scale);
    }
    cpu::accumulate(ex, x, y, scale);
}
template void accumulate(const Exec&, View<const float, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const float, 2>, View<bf16, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<bf16, 2>, float);

template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y) {
    require_input("cast", ex, "x", x);
    require_shape("cast", "y", "t d", y, x.shape);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::cast(ex, x, y);
    }
    cpu::cast(ex, x, y);
}
template void cast(const Exec&, View<const float, 2>, View<float, 2>);
template void cast(const Exec&, View<const float, 2>, View<bf16, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<float, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm
