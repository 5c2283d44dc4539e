#include "ssm/ops/rms_norm/rms_norm.h"

#include "ssm/core/dtype.h"
#include "ssm/ops/rms_norm/rms_norm_impl.h"

namespace ssm {
namespace {

using Gate = RmsNormOptions::Gate;

void require_options(std::string_view op, const RmsNormOptions& options, int64_t d) {
    require(d >= 1, op, "d must be at least 1 but is {}", d);
    require(options.groups >= 1 && d % options.groups == 0, op, "groups = {} does not divide d = {}",
            options.groups, d);
    require(options.eps >= 0, op, "eps must be >= 0 but is {}", options.eps);
}

template <class X, class Y>
void require_inputs(std::string_view op, const RmsNormInputs<X, Y>& in, const RmsNormOptions& options) {
    const int64_t t = in.x.shape[0], d = in.x.shape[1];
    require(static_cast<bool>(in.x), op, "`x` is absent");
    require_options(op, options, d);
    require_shape_if(op, "weight", "d", in.weight, {d});
    require(in.weight.dense(), op, "`weight` must be dense");
    require(in.z || options.gate == Gate::none, op, "`z` is absent but there is a gate");
    require(!in.z || options.gate != Gate::none, op, "`z` is given but there is no gate");
    require_shape_if(op, "z", "t d", in.z, {t, d});
}

}  // namespace

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormInputs<X, Y>& in, View<Y, 2> y, View<float, 2> rstd,
              const RmsNormOptions& options) {
    constexpr std::string_view op = "rms_norm";
    const int64_t t = in.x.shape[0], d = in.x.shape[1];
    require_device(op, ex);
    require_inputs(op, in, options);
    require_shape(op, "y", "t d", y, {t, d});
    require_shape_if(op, "rstd", "t groups", rstd, {t, options.groups});
    const RmsNormCall<X, Y> call{{}, in, {}, y, rstd, options};
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::rms_norm(ex, call);
    }
    cpu::rms_norm(ex, call);
}

template <class X, class Y>
void add_rms_norm(const Exec& ex, View<const float, 2> residual, View<const X, 2> x,
                  View<const float, 1> weight, View<float, 2> residual_out, View<Y, 2> y, View<float, 2> rstd,
                  const RmsNormOptions& options) {
    constexpr std::string_view op = "add_rms_norm";
    const int64_t t = x.shape[0], d = x.shape[1];
    require_device(op, ex);
    require(options.gate == Gate::none, op, "a gate is not supported");
    const RmsNormInputs<X, Y> in{x, weight, {}};
    require_inputs(op, in, options);
    require_shape(op, "residual", "t d", residual, {t, d});
    require_shape(op, "residual_out", "t d", residual_out, {t, d});
    require_shape(op, "y", "t d", y, {t, d});
    require_shape_if(op, "rstd", "t groups", rstd, {t, options.groups});
    const RmsNormCall<X, Y> call{residual, in, residual_out, y, rstd, options};
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::rms_norm(ex, call);
    }
    cpu::rms_norm(ex, call);
}

template <class X, class Y>
void rms_norm_backward(const Exec& ex, const RmsNormInputs<X, Y>& in, View<const float, 2> rstd,
                       std::type_identity_t<View<const Y, 2>> grad_y,
                       const std::type_identity_t<RmsNormGradients<X, Y>>& grad,
                       const RmsNormOptions& options) {
    constexpr std::string_view op = "rms_norm_backward";
    const int64_t t = in.x.shape[0], d = in.x.shape[1];
    require_device(op, ex);
    require_inputs(op, in, options);
    require_shape(op, "rstd", "t groups", rstd, {t, options.groups});
    require_shape(op, "grad_y", "t d", grad_y, {t, d});
    require_shape_if(op, "grad.x", "t d", grad.x, {t, d});
    require_shape_if(op, "grad.weight", "d", grad.weight, {d});
    require_shape_if(op, "grad.z", "t d", grad.z, {t, d});
    require(grad.weight.dense(), op, "`grad.weight` must be dense");
    require(!grad.weight || in.weight, op, "`grad.weight` is given but `weight` is absent");
    require(!grad.z || in.z, op, "`grad.z` is given but `z` is absent");
    require_shape_if(op, "grad.branch", "t d", grad.branch, {t, d});
    require(!grad.branch || grad.x, op, "`grad.branch` is given but `grad.x` is absent");
    const RmsNormBackwardCall<X, Y> call{in, rstd, grad_y, grad, options};
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::rms_norm_backward(ex, call);
    }
    if constexpr (std::is_same_v<X, float> && std::is_same_v<Y, float>) {
        cpu::rms_norm_backward(ex, call);
    } else {
        fail(ErrorCode::unsupported, op, "gradients of bf16 activations need a GPU");
    }
}

template void rms_norm(const Exec&, const RmsNormInputs<float, float>&, View<float, 2>, View<float, 2>,
                       const RmsNormOptions&);
template void rms_norm(const Exec&, const RmsNormInputs<float, bf16>&, View<bf16, 2>, View<float, 2>,
                       const RmsNormOptions&);
template void rms_norm(const Exec&, const RmsNormInputs<bf16, bf16>&, View<bf16, 2>, View<float, 2>,
                       const RmsNormOptions&);
template void add_rms_norm(const Exec&, View<const float, 2>, View<const float, 2>, View<const float, 1>,
                           View<float, 2>, View<float, 2>, View<float, 2>, const RmsNormOptions&);
template void add_rms_norm(const Exec&, View<const float, 2>, View<const float, 2>, View<const float, 1>,
                           View<float, 2>, View<bf16, 2>, View<float, 2>, const RmsNormOptions&);
template void add_rms_norm(const Exec&, View<const float, 2>, View<const bf16, 2>, View<const float, 1>,
                           View<float, 2>, View<bf16, 2>, View<float, 2>, const RmsNormOptions&);
template void rms_norm_backward(const Exec&, const RmsNormInputs<float, float>&, View<const float, 2>,
                                View<const float, 2>, const RmsNormGradients<float, float>&,
                                const RmsNormOptions&);
template void rms_norm_backward(const Exec&, const RmsNormInputs<float, bf16>&, View<const float, 2>,
                                View<const bf16, 2>, const RmsNormGradients<float, bf16>&,
                                const RmsNormOptions&);
template void rms_norm_backward(const Exec&, const RmsNormInputs<bf16, bf16>&, View<const float, 2>,
                                View<const bf16, 2>, const RmsNormGradients<bf16, bf16>&,
                                const RmsNormOptions&);

}  // namespace ssm
