#include "ssm/autograd/derivatives.h"

#include <array>

#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/elementwise/elementwise.h"
#include "ssm/ops/embedding/embedding.h"

namespace ssm {
namespace {

constexpr int64_t kGpuChunk = 2048;  // tokens between two saved states of ssd on a GPU

// The result of an operator: wants a gradient, of its own type, exactly when its backward is recorded.
Var result(const Ctx& ctx, Shape shape, DType dtype, bool recording) {
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
bool is_step(const Ctx& ctx, const Tensor& x, const Tensor& state) {
    return ctx.cu_seqlens.empty() && (ctx.slots || x.dim(0) == state.dim(0));
}

// Any tensor as a matrix for the elementwise operators.
Tensor as_matrix(const Tensor& t) { return t.rank() == 2 ? t : t.reshape({1, t.size()}); }

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
            const auto [gx, gw] = targets(ex, {x, weight});
            linear_backward(ex, y.grad(ex), x.value(), weight.value(), gx.tensor, gw.template view<float>(),
                            grad_if<1>(ex, bias), {.x = gx.fresh, .weight = gw.fresh});
        });
    }
    return y;
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

namespace {

template <class T>
SelectiveScanInputs<T> scan_inputs(const SelectiveScanVars& in, CuSeqlens cu) {
    return {in.u.value().view<const T, 2>(),
            in.delta.value().view<const float, 2>(),
            in.A.value().view<const float, 2>(),
            in.B.value().view<const float, 2>(),
            in.C.value().view<const float, 2>(),
            value_if<float, 1>(in.D),
            value_if<T, 2>(in.z),
            value_if<float, 1>(in.delta_bias),
            cu,
            {},
            true};
}

}  // namespace

Var selective_scan(Ctx& ctx, const SelectiveScanVars& in, Tensor* state,
                   const SelectiveScanOptions& options) {
    const bool recording =
        ctx.recording({&in.u, &in.delta, &in.A, &in.B, &in.C, &in.D, &in.z, &in.delta_bias});
    require(!(recording && state != nullptr), "selective_scan",
            "a carried state is for inference, without a tape");
    Var y = result(ctx, in.u.value().shape(), in.u.value().dtype(), recording);
    const int64_t d = in.A.value().dim(0), n = in.A.value().dim(1);
    Tensor chunk_states;
    if (recording) {
        chunk_states = Tensor::empty(ctx.exec, {selective_scan_chunks(ctx.cu_seqlens, options.chunk), d, n});
    }
    dispatch_activation(in.u.value().dtype(), "selective_scan", [&]<class T>() {
        auto inputs = scan_inputs<T>(in, ctx.cu_seqlens);
        inputs.slots = ctx.slots;
        const auto out = y.value().view<T, 2>();
        if (state == nullptr) {
            selective_scan(ctx.exec, inputs, out, {}, chunk_states.view_if<float, 3>(), options);
        } else if (is_step(ctx, in.u.value(), *state)) {
            selective_scan_step(ctx.exec, inputs, state->view<float, 3>(), out);
        } else {
            Tensor end = Tensor::empty(ctx.exec, state->shape());
            inputs.initial_state = state->view<const float, 3>();
            selective_scan(ctx.exec, inputs, out, end.view<float, 3>(), {}, options);
            *state = end;
        }
    });
    if (recording) {
        std::vector<int64_t> cu(ctx.cu_seqlens.begin(), ctx.cu_seqlens.end());
        ctx.tape->record([&ex = ctx.exec, cu = std::move(cu), in, y, chunk_states, options] {
            const auto [u, delta, B, C, z] = targets(ex, {in.u, in.delta, in.B, in.C, in.z});
            dispatch_activation(y.value().dtype(), "selective_scan", [&]<class T>() {
                selective_scan_backward<T>(ex, scan_inputs<T>(in, cu), chunk_states.view<const float, 3>(),
                                           y.grad(ex).view<const T, 2>(), {},
                                           {u.template view<T>(),
                                            delta.template view<float>(),
                                            grad_if<2>(ex, in.A),
                                            B.template view<float>(),
                                            C.template view<float>(),
                                            grad_if<1>(ex, in.D),
                                            z.template view<T>(),
                                            grad_if<1>(ex, in.delta_bias),
                                            {},
                                            {u.fresh, delta.fresh, B.fresh, C.fresh, z.fresh}},
                                           options);
            });
        });
    }
    return y;
}

namespace {

template <class T>
SsdInputs<T> ssd_inputs(const SsdVars& in, const SsdShape& s, CuSeqlens cu) {
    const int64_t t = in.x.value().dim(0);
    SsdInputs<T> r;
    r.x = in.x.value().reshape({t, s.h, s.p}).view<const T, 3>();
    r.dt = in.dt.value().view<const T, 2>();
    r.A = in.A.value().view<const float, 1>();
    r.B = in.B.value().reshape({t, s.g, s.n}).view<const T, 3>();
    r.C = in.C.value().reshape({t, s.g, s.n}).view<const T, 3>();
    if (in.D) r.D = in.D.value().reshape({s.h, in.D.value().size() / s.h}).view<const float, 2>();
    r.dt_bias = value_if<float, 1>(in.dt_bias);
    r.cu_seqlens = cu;
    r.dt_min = s.dt_min;
    r.dt_max = s.dt_max;
    return r;
}

}  // namespace

Var ssd(Ctx& ctx, const SsdVars& in, const SsdShape& s, Tensor* state, SsdOptions options) {
    // A GPU makes the states again faster than it would read them: few are kept.
    if (ctx.exec.device != Device::cpu) options.chunk = std::max(options.chunk, kGpuChunk);
    const bool recording = ctx.recording({&in.x, &in.dt, &in.A, &in.B, &in.C, &in.D, &in.dt_bias});
    require(!(recording && state != nullptr), "ssd", "a carried state is for inference, without a tape");
    const int64_t t = in.x.value().dim(0);
    Var y = result(ctx, {t, s.h * s.p}, in.x.value().dtype(), recording);
    Tensor chunk_states;
    if (recording)
        chunk_states = Tensor::empty(ctx.exec, {ssd_chunks(ctx.cu_seqlens, options.chunk), s.h, s.p, s.n});
    dispatch_activation(in.x.value().dtype(), "ssd", [&]<class T>() {
        auto inputs = ssd_inputs<T>(in, s, ctx.cu_seqlens);
        inputs.slots = ctx.slots;
        const auto out = y.value().reshape({t, s.h, s.p}).view<T, 3>();
        if (state == nullptr) {
            ssd(ctx.exec, inputs, out, {}, chunk_states.view_if<float, 4>(), options);
        } else if (is_step(ctx, in.x.value(), *state)) {
            dispatch_activation(state->dtype(), "ssd", [&]<class S>() {
                ssd_step<T, S>(ctx.exec, inputs, state->view<S, 4>(), out);
            });
        } else {
            Tensor end = Tensor::empty(ctx.exec, state->shape());
            inputs.initial_state = state->view<const float, 4>();
            ssd(ctx.exec, inputs, out, end.view<float, 4>(), {}, options);
            *state = end;
        }
    });
    if (recording) {
        std::vector<int64_t> cu(ctx.cu_seqlens.begin(), ctx.cu_seqlens.end());
        ctx.tape->record([&ex = ctx.exec, cu = std::move(cu), in, s, y, chunk_states, options, t] {
            const int64_t d_last = in.D ? in.D.value().size() / s.h : 1;
            const Shape group{t, s.g, s.n}, heads{t, s.h, s.p};
            const auto [x, dt, B, C] = targets(ex, {in.x, in.dt, in.B, in.C});
            dispatch_activation(y.value().dtype(), "ssd", [&]<class T>() {
                ssd_backward<T>(ex, ssd_inputs<T>(in, s, cu), chunk_states.view<const float, 4>(),
                                y.grad(ex).reshape(heads).view<const T, 3>(), {},
                                {x.template view<T>(heads),
                                 dt.template view<T>(),
                                 grad_if<1>(ex, in.A),
                                 B.template view<T>(group),
                                 C.template view<T>(group),
                                 grad_if<2>(ex, in.D, {s.h, d_last}),
                                 grad_if<1>(ex, in.dt_bias),
                                 {},
                                 {x.fresh, dt.fresh, B.fresh, C.fresh}},
                                options);
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
    const auto va = a.value().view<const float, 2>(), vb = b.value().view<const float, 2>();
    multiply(ctx.exec, va, vb, y.value().view<float, 2>());
    if (recording) {
        ctx.tape->record([&ex = ctx.exec, a, b, va, vb, y] {
            multiply_backward(ex, va, vb, y.grad(ex).view<const float, 2>(), grad_if<2>(ex, a),
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
        linear_cross_entropy_backward(ctx.exec, hidden.value(), weight.value(), ids,
                                      weights.view<const float, 1>(), nll.view<float, 1>(), grad_hidden,
                                      grad_if<2>(ctx.exec, weight), true);
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
