#include "ssm/ops/mamba_step/mamba_step.h"

#include "ssm/ops/mamba_step/mamba_step_impl.h"
#include "ssm/ops/rms_norm/rms_norm.h"
#include "ssm/ops/selective_scan/selective_scan.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "mamba_step";

void require_tensor(std::string_view name, const Tensor& t, DType dtype, const Shape& shape) {
    require(static_cast<bool>(t), kOp, "`{}` is absent", name);
    require(t.dtype() == dtype && t.shape() == shape, kOp, "`{}` must be {} {} but is {} {}", name,
            name_of(dtype), to_string(shape), name_of(t.dtype()), to_string(t.shape()));
}

void check(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y) {
    require_device(kOp, ex);
    require(static_cast<bool>(in.dt_weight) && in.A && in.x, kOp, "`x`, `dt_weight` or `A` is absent");
    const int64_t t = in.x.dim(0), d = in.A.shape[0], n = in.A.shape[1], r = in.dt_weight.weight().dim(1);
    require(in.dt_weight.weight().dim(0) == d, kOp, "`dt_weight` must be [d r] = [{}, any] but is {}", d,
            to_string(in.dt_weight.weight().shape()));
    require_tensor("x", in.x, in.x.dtype(), {t, d});
    require_tensor("z", in.z, in.x.dtype(), {t, d});
    require_tensor("y", y, in.x.dtype(), {t, d});
    require_tensor("dbc", in.dbc, DType::f32, {t, r + 2 * n});
    require_shape_if(kOp, "dt_bias", "d", in.dt_bias, {d});
    require_shape_if(kOp, "D", "d", in.D, {d});
    require(state && state.rank() == 3 && (state.dtype() == DType::f32 || state.dtype() == DType::bf16), kOp,
            "`state` must be f32 or bf16 [t d n]");
    const int64_t states = in.slots ? state.dim(0) : t;
    require_tensor("state", state, state.dtype(), {states, d, n});
    require_slots(kOp, ex.device == Device::cpu, in.slots, t, states);
}

// Columns begin .. end of dbc, normed where asked for.
Tensor part(const Exec& ex, const MambaStepInputs& in, int64_t begin, int64_t end) {
    const Tensor columns = in.dbc.columns(begin, end);
    if (!in.norm_eps) return columns;
    Tensor y = Tensor::empty(ex, columns.shape());
    rms_norm<float, float>(ex, {columns.view<const float, 2>(), {}, {}}, y.view<float, 2>(), {},
                           {.eps = *in.norm_eps});
    return y;
}

}  // namespace

void mamba_step(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y) {
    check(ex, in, state, y);
    if (y.size() == 0) return;
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::mamba_step(ex, in, state, y);
    }
    if (state.dtype() != DType::f32) fail(ErrorCode::unsupported, kOp, "bf16 states need a GPU");
    const int64_t r = in.dt_weight.weight().dim(1), n = in.A.shape[1];
    const Tensor delta = Tensor::empty(ex, in.x.shape());
    linear(ex, part(ex, in, 0, r), in.dt_weight, {}, delta);
    const Tensor B = part(ex, in, r, r + n), C = part(ex, in, r + n, r + 2 * n);
    dispatch_activation(in.x.dtype(), kOp, [&]<class T>() {
        SelectiveScanInputs<T> scan;
        scan.u = in.x.view<const T, 2>();
        scan.delta = delta.view<const float, 2>();
        scan.A = in.A;
        scan.B = B.view<const float, 2>();
        scan.C = C.view<const float, 2>();
        scan.D = in.D;
        scan.z = in.z.view<const T, 2>();
        scan.delta_bias = in.dt_bias;
        scan.slots = in.slots;
        selective_scan_step<T>(ex, scan, state.view<float, 3>(), y.view<T, 2>());
    });
}

}  // namespace ssm
