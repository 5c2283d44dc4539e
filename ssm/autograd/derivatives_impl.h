// What the differentiable functions (derivatives.h) share: their results, and where their gradients go.
// Private.
#pragma once

#include <array>

#include "ssm/autograd/derivatives.h"

namespace ssm::derivatives_impl {

// The result of an operator: wants a gradient, of its own type, exactly when its backward is recorded.
inline Var result(const Ctx& ctx, Shape shape, DType dtype, bool recording) {
    return Var(Tensor::empty(ctx.exec, std::move(shape), dtype), recording, dtype);
}

template <class T, int R>
View<const T, R> value_if(const Var& v) {
    return v ? v.value().view<const T, R>() : View<const T, R>{};
}
// The view of a gradient that is wanted; absent otherwise.
template <int R>
View<float, R> grad_if(const Exec& ex, const Var& v) {
    return v.requires_grad() ? v.grad(ex).view<float, R>() : View<float, R>{};
}
template <int R>
View<float, R> grad_if(const Exec& ex, const Var& v, const Shape& shape) {
    return v.requires_grad() ? v.grad(ex).reshape(shape).view<float, R>() : View<float, R>{};
}

// The gradients for an operator that can set fresh ones. One that another of the same call adds to, because
// an input is used twice, is zeroed instead.
struct Target {
    Tensor tensor;
    bool fresh = false;

    template <class T>
    View<T, 2> view() const {
        return tensor.view_if<T, 2>();
    }
    template <class T>
    View<T, 3> view(const Shape& shape) const {
        return tensor ? tensor.reshape(shape).view<T, 3>() : View<T, 3>{};
    }
    // Both slices of a row, or whole matrices: do they share an element?
    bool meets(const Target& o) const {
        const auto end = [](const Tensor& t) {
            return t.raw() + static_cast<size_t>(t.dim(1)) * size_of(t.dtype());
        };
        return tensor && o.tensor && o.tensor.raw() < end(tensor) && tensor.raw() < end(o.tensor);
    }
};
template <size_t N>
std::array<Target, N> targets(const Exec& ex, const Var (&vars)[N]) {
    std::array<Target, N> all;
    for (size_t i = 0; i < N; ++i) {
        if (!vars[i].requires_grad()) continue;
        const Var::GradTarget target = vars[i].grad_target(ex);
        all[i] = {target.tensor, target.fresh};
    }
    for (Target& a : all) {
        for (const Target& b : all) {
            if (!a.fresh || b.fresh || !a.meets(b)) continue;
            a.tensor.fill_zero();
            a.fresh = false;
        }
    }
    return all;
}

// One token of each sequence, whose states are `state`'s rows.
inline bool is_step(const Ctx& ctx, const Tensor& x, const Tensor& state) {
    return ctx.cu_seqlens.empty() && (ctx.slots || x.dim(0) == state.dim(0));
}

// Any tensor as a matrix for the elementwise operators.
inline Tensor as_matrix(const Tensor& t) { return t.rank() == 2 ? t : t.reshape({1, t.size()}); }

}  // namespace ssm::derivatives_impl
