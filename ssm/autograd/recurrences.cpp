// The derivatives of the two recurrences (derivatives.h).
#include "ssm/autograd/derivatives_impl.h"

namespace ssm {

using namespace derivatives_impl;

namespace {

constexpr int64_t kGpuChunk = 2048;  // tokens between two saved states of ssd on a GPU

template <class T>
SelectiveScanInputs<T> scan_inputs(const SelectiveScanVars& in, CuSeqlens cu) {
    return {in.u.value().view<const T, 2>(),
            in.delta.value().view<const T, 2>(),
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
            const bool again = !y.value();
            const Tensor grad_y = y.grad(ex);
            y.forget_value();
            const auto [u, delta, B, C, z] = targets(ex, {in.u, in.delta, in.B, in.C, in.z});
            dispatch_activation(y.value().dtype(), "selective_scan", [&]<class T>() {
                SelectiveScanGradients<T> grad{u.template view<T>(),
                                               delta.template view<T>(),
                                               grad_if<2>(ex, in.A),
                                               B.template view<float>(),
                                               C.template view<float>(),
                                               grad_if<1>(ex, in.D),
                                               z.template view<T>(),
                                               grad_if<1>(ex, in.delta_bias),
                                               {},
                                               {u.fresh, delta.fresh, B.fresh, C.fresh, z.fresh}};
                if (again) grad.y = grad_y.view<T, 2>();  // in its place
                selective_scan_backward<T>(ex, scan_inputs<T>(in, cu), chunk_states.view<const float, 3>(),
                                           grad_y.view<const T, 2>(), {}, grad, options);
            });
            if (again) {
                y.clear_grad();
                y.set_value(grad_y);
            }
        });
    }
    return y;
}

void forget_scanned(Ctx& ctx, const Var& y) {
    if (ctx.exec.device != Device::cpu && ctx.recording({&y})) y.forget_value();
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
            y.forget_value();
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

}  // namespace ssm
