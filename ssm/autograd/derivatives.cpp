#include "ssm/autograd/derivatives_impl.h"
#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/elementwise/elementwise.h"
#include "ssm/ops/embedding/embedding.h"

namespace ssm {
using namespace derivatives_impl;

namespace {

// y = f(x) elementwise, with f_backward(x, grad_y, grad_x).
template <class Forward, class Backward>
Var unary(Ctx& ctx, const Var& x, Forward forward, Backward backward) {
    const bool recording = ctx.recording({&x});
    Var y = result(ctx, x.value().shape(), DType::f32, recording);
    forward(ctx.exec, as_matrix(x.value()).view<const float, 2>(), as_matrix(y.value()).view<float, 2>());
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, x, y, backward] {
            backward(ex, x, y, as_matrix(y.grad(ex)).view<const float, 2>(),
                     as_matrix(x.grad(ex)).view<float, 2>());
        });
    }
    return y;
}

}  // namespace

Var embedding(Ctx& ctx, const Tensor& ids, const Var& weight) {
    const bool recording = ctx.recording({&weight});
    Var y = result(ctx, {ids.size(), weight.value().dim(1)}, DType::f32, recording);
    dispatch_activation(weight.value().dtype(), "embedding", [&]<class W>() {
        embedding(ctx.exec, ids.view<const int32_t, 1>(), weight.value().view<const W, 2>(),
                  y.value().view<float, 2>());
    });
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, ids, weight, y] {
            embedding_backward(ex, ids.view<const int32_t, 1>(), y.grad(ex).view<const float, 2>(),
                               weight.grad(ex).view<float, 2>());
        });
    }
    return y;
}

Var linear(Ctx& ctx, const Var& x, const Var& weight, const Var& bias, DType out) {
    const bool recording = ctx.recording({&x, &weight, &bias});
    Var y = result(ctx, {x.value().dim(0), weight.value().dim(0)}, out, recording);
    linear(ctx.exec, x.value(), weight.value(), value_if<float, 1>(bias), y.value());
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, x, weight, bias, y] {
            y.forget_value();
            if (x.value() && (!x.requires_grad() || x.value().dtype() == x.grad_dtype())) {
                const auto [gx, gw] = targets(ex, {x, weight});
                linear_backward(ex, y.grad(ex), x.value(), weight.value(), gx.tensor,
                                gw.template view<float>(), grad_if<1>(ex, bias),
                                {.x = gx.fresh, .weight = gw.fresh});
                return;
            }
            // x comes once more from its own backward pass, which wants its gradient first; or it is rounded
            // and its gradient is not.
            const auto [gx] = targets(ex, {x});
            linear_backward(ex, y.grad(ex), gx.tensor, weight.value(), gx.tensor, {}, grad_if<1>(ex, bias),
                            {.x = gx.fresh});
            x.when_there([&ex, weight, y](const Tensor& again) {
                const auto [gw] = targets(ex, {weight});
                linear_backward(ex, y.grad(ex), again, weight.value(), {}, gw.template view<float>(), {},
                                {.weight = gw.fresh});
            });
        });
    }
    return y;
}

Var rounded(Ctx& ctx, const Var& x) {
    if (x.value().dtype() == ctx.activation) return x;
    const Tensor copy = Tensor::empty(ctx.exec, x.value().shape(), ctx.activation);
    cast(ctx.exec, x.value().view<const float, 2>(), copy.view<bf16, 2>());
    return x.with_value(copy);
}

namespace {

// f.operator()<X, Y>() for the types that rms_norm has.
template <class F>
void dispatch_norm(DType x, DType y, F&& f) {
    if (x == DType::bf16) return f.template operator()<bf16, bf16>();
    dispatch_activation(y, "rms_norm", [&]<class Y>() { f.template operator()<float, Y>(); });
}

}  // namespace

Var rms_norm(Ctx& ctx, const Var& x, const Var& weight, const Var& z, const RmsNormOptions& options,
             DType out) {
    const bool recording = ctx.recording({&x, &weight, &z});
    Var y = result(ctx, x.value().shape(), out, recording);
    Tensor rstd = recording ? Tensor::empty(ctx.exec, {x.value().dim(0), options.groups}) : Tensor();
    dispatch_norm(x.value().dtype(), out, [&]<class X, class Y>() {
        const RmsNormInputs<X, Y> in{x.value().view<const X, 2>(), value_if<float, 1>(weight),
                                     value_if<Y, 2>(z)};
        rms_norm(ctx.exec, in, y.value().view<Y, 2>(), rstd.view_if<float, 2>(), options);
    });
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, x, weight, z, y, rstd, options] {
            y.forget_value();
            const auto [gx, gz] = targets(ex, {x, z});
            dispatch_norm(x.value().dtype(), y.value().dtype(), [&]<class X, class Y>() {
                const RmsNormInputs<X, Y> in{x.value().view<const X, 2>(), value_if<float, 1>(weight),
                                             value_if<Y, 2>(z)};
                rms_norm_backward(ex, in, rstd.view<const float, 2>(), y.grad(ex).view<const Y, 2>(),
                                  {gx.template view<X>(),
                                   grad_if<1>(ex, weight),
                                   gz.template view<Y>(),
                                   {},
                                   gx.fresh,
                                   gz.fresh},
                                  options);
            });
        });
    }
    return y;
}

Normed add_rms_norm(Ctx& ctx, const Var& residual, const Var& x, const Var& weight,
                    const RmsNormOptions& options, DType out) {
    if (!x) return {residual, rms_norm(ctx, residual, weight, Var(), options, out)};
    const bool recording = ctx.recording({&residual, &x, &weight});
    // Inference adds in place; a recorded residual is what the backward pass of the layers before needs.
    Var sum = ctx.inference() ? residual : result(ctx, residual.value().shape(), DType::f32, recording);
    Var y = result(ctx, residual.value().shape(), out, recording);
    Tensor rstd = recording ? Tensor::empty(ctx.exec, {x.value().dim(0), options.groups}) : Tensor();
    dispatch_norm(x.value().dtype(), out, [&]<class X, class Y>() {
        add_rms_norm(ctx.exec, residual.value().view<const float, 2>(), x.value().view<const X, 2>(),
                     value_if<float, 1>(weight), sum.value().view<float, 2>(), y.value().view<Y, 2>(),
                     rstd.view_if<float, 2>(), options);
    });
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, residual, x, weight, sum, y, rstd, options] {
            y.forget_value();
            const auto [total] = targets(ex, {sum});
            const bool rounded = x.requires_grad() && !x.has_grad() && x.grad_dtype() == y.grad_dtype();
            const Tensor branch = rounded ? x.grad_target(ex).tensor : Tensor();
            dispatch_activation(y.value().dtype(), "rms_norm", [&]<class Y>() {
                const RmsNormInputs<float, Y> in{
                    sum.value().view<const float, 2>(), value_if<float, 1>(weight), {}};
                rms_norm_backward(ex, in, rstd.view<const float, 2>(), y.grad(ex).view<const Y, 2>(),
                                  {total.template view<float>(),
                                   grad_if<1>(ex, weight),
                                   {},
                                   branch.view_if<Y, 2>(),
                                   total.fresh,
                                   false},
                                  options);
            });
            if (!rounded && x.requires_grad()) x.add_grad(ex, total.tensor);
            // The sum's gradient is used up: the residual takes the buffer over instead of a copy.
            if (residual.requires_grad()) residual.take_grad(ex, total.tensor);
            sum.clear_grad();
        });
    }
    return {sum, y};
}

Var causal_conv1d(Ctx& ctx, const Var& x, const Var& weight, const Var& bias, Activation activation,
                  Tensor* state) {
    const bool recording = ctx.recording({&x, &weight, &bias});
    require(!(recording && state != nullptr), "causal_conv1d",
            "a carried state is for inference, without a tape");
    Var y = result(ctx, x.value().shape(), x.value().dtype(), recording);
    const int64_t d = weight.value().dim(0), k = weight.value().dim(-1);
    const auto w = weight.value().reshape({d, k}).view<const float, 2>();
    dispatch_activation(x.value().dtype(), "causal_conv1d", [&]<class T>() {
        CausalConv1dInputs<T> in{x.value().view<const T, 2>(),
                                 w,
                                 value_if<float, 1>(bias),
                                 ctx.cu_seqlens,
                                 {},
                                 activation,
                                 ctx.slots};
        if (state == nullptr) {
            causal_conv1d(ctx.exec, in, y.value().view<T, 2>(), {});
        } else if (is_step(ctx, x.value(), *state)) {
            causal_conv1d_step(ctx.exec, in, state->view<T, 3>(), y.value().view<T, 2>());
        } else {
            in.initial_state = state->view<const T, 3>();
            causal_conv1d(ctx.exec, in, y.value().view<T, 2>(), state->view<T, 3>());
        }
    });
    if (recording) {
        std::vector<int64_t> cu(ctx.cu_seqlens.begin(), ctx.cu_seqlens.end());
        ctx.tape->record([&ex = ctx.exec, cu = std::move(cu), x, weight, bias, activation, y, w, d, k] {
            y.forget_value();
            const auto [gx] = targets(ex, {x});
            dispatch_activation(x.value().dtype(), "causal_conv1d", [&]<class T>() {
                const CausalConv1dInputs<T> in{
                    x.value().view<const T, 2>(), w, value_if<float, 1>(bias), cu, {}, activation};
                causal_conv1d_backward<T>(ex, in, y.grad(ex).view<const T, 2>(), {},
                                          {gx.template view<T>(),
                                           grad_if<2>(ex, weight, {d, k}),
                                           grad_if<1>(ex, bias),
                                           {},
                                           gx.fresh});
            });
        });
    }
    return y;
}

Var neg_exp(Ctx& ctx, const Var& x) {
    return unary(
        ctx, x, [](auto&&... a) { neg_exp(a...); },
        [](const Exec& ex, const Var&, const Var& y, View<const float, 2> grad_y, View<float, 2> grad_x) {
            neg_exp_backward(ex, as_matrix(y.value()).view<const float, 2>(), grad_y, grad_x);
        });
}

Var silu(Ctx& ctx, const Var& x) {
    return unary(
        ctx, x, [](auto&&... a) { silu(a...); },
        [](const Exec& ex, const Var& in, const Var&, View<const float, 2> grad_y, View<float, 2> grad_x) {
            silu_backward(ex, as_matrix(in.value()).view<const float, 2>(), grad_y, grad_x);
        });
}

Var softplus(Ctx& ctx, const Var& x) {
    return unary(
        ctx, x, [](auto&&... a) { softplus(a...); },
        [](const Exec& ex, const Var& in, const Var&, View<const float, 2> grad_y, View<float, 2> grad_x) {
            softplus_backward(ex, as_matrix(in.value()).view<const float, 2>(), grad_y, grad_x);
        });
}

Var add(Ctx& ctx, const Var& a, const Var& b) {
    const bool recording = ctx.recording({&a, &b});
    Var y = result(ctx, a.value().shape(), DType::f32, recording);
    add(ctx.exec, a.value().view<const float, 2>(), b.value().view<const float, 2>(),
        y.value().view<float, 2>());
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, a, b, y] {
            const Tensor g = y.grad(ex);
            if (a.requires_grad()) a.add_grad(ex, g);
            if (b.requires_grad()) b.add_grad(ex, g);
        });
    }
    return y;
}

Var multiply(Ctx& ctx, const Var& a, const Var& b) {
    const bool recording = ctx.recording({&a, &b});
    Var y = result(ctx, a.value().shape(), DType::f32, recording);
    const auto view = [](const Var& v) { return v.value().view<const float, 2>(); };
    multiply(ctx.exec, view(a), view(b), y.value().view<float, 2>());
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, a, b, view, y] {
            multiply_backward(ex, view(a), view(b), y.grad(ex).view<const float, 2>(), grad_if<2>(ex, a),
                              grad_if<2>(ex, b));
        });
    }
    return y;
}

Var linear_cross_entropy(Ctx& ctx, const Var& hidden, const Var& weight, const Tensor& targets,
                         const Tensor& weights) {
    const bool recording = ctx.recording({&hidden, &weight});
    const int64_t t = targets.size();
    const Tensor nll = Tensor::empty(ctx.exec, {t}), loss = Tensor::empty(ctx.exec, {1});
    const auto ids = targets.view<const int32_t, 1>();
    if (recording) {
        // One pass gives the loss and its gradients: that of hidden waits here until backward runs, that of
        // the weight is added now.
        const Tensor grad_hidden = Tensor::empty(ctx.exec, hidden.value().shape(), hidden.grad_dtype());
        const auto [gw] = derivatives_impl::targets(ctx.exec, {weight});
        if (t == 0 && gw.fresh) gw.tensor.fill_zero();
        linear_cross_entropy_backward(ctx.exec, hidden.value(), weight.value(), ids,
                                      weights.view<const float, 1>(), nll.view<float, 1>(), grad_hidden,
                                      gw.template view<float>(), {.hidden = true, .weight = gw.fresh});
        ctx.tape->record([&ex = ctx.exec, hidden, grad_hidden] {
            if (hidden.requires_grad()) hidden.take_grad(ex, grad_hidden);
        });
    } else {
        linear_cross_entropy(ctx.exec, hidden.value(), PackedWeight(weight.value()), ids,
                             nll.view<float, 1>());
    }
    const auto row = nll.reshape({1, t}).view<float, 2>();
    multiply(ctx.exec, row, weights.reshape({1, t}).view<const float, 2>(), row);
    mean_nll(ctx.exec, nll.view<const float, 1>(), 1.0, loss.view<float, 1>());
    return Var(loss, recording);
}

}  // namespace ssm
