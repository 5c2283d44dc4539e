#include "ssm/ops/causal_conv1d/causal_conv1d.h"

#include "ssm/core/dtype.h"
#include "ssm/ops/causal_conv1d/causal_conv1d_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "causal_conv1d";

template <class T>
void check_inputs(const Exec& ex, const CausalConv1dInputs<T>& in) {
    require_device(kOp, ex);
    require(static_cast<bool>(in.x), kOp, "`x` must be [t d] but is absent");
    require(static_cast<bool>(in.weight), kOp, "`weight` must be [d k] but is absent");
    require(in.weight.shape[1] >= 1, kOp, "`weight` must be [d k] with k >= 1 but is {}",
            in.weight.shape_string());
    require_shape(kOp, "weight", "d k", in.weight, {in.x.shape[1], in.weight.shape[1]});
    require_shape_if(kOp, "bias", "d", in.bias, {in.x.shape[1]});
}

// The shape of a state: [s k-1 d].
template <class T>
std::array<int64_t, 3> check_sequences(const CausalConv1dInputs<T>& in) {
    require_cu_seqlens(kOp, in.cu_seqlens, in.x.shape[0]);
    const std::array<int64_t, 3> state{static_cast<int64_t>(in.cu_seqlens.size()) - 1, in.weight.shape[1] - 1,
                                       in.x.shape[1]};
    require_shape_if(kOp, "initial_state", "s k-1 d", in.initial_state, state);
    return state;
}

}  // namespace

template <class T>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state) {
    check_inputs(ex, in);
    const auto state = check_sequences(in);
    require_shape(kOp, "y", "t d", y, in.x.shape);
    require_shape_if(kOp, "final_state", "s k-1 d", final_state, state);
    require(in.x.size() == 0 || static_cast<const void*>(y.data) != in.x.data, kOp, "`y` must not alias `x`");
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::causal_conv1d(ex, in, y, final_state);
    }
    cpu::causal_conv1d(ex, in, y, final_state);
}

template <class T>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<T>& in, View<const T, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<T>& grad) {
    check_inputs(ex, in);
    const auto state = check_sequences(in);
    require_shape(kOp, "grad_y", "t d", grad_y, in.x.shape);
    require_shape_if(kOp, "grad_final_state", "s k-1 d", grad_final_state, state);
    require_shape_if(kOp, "grad.x", "t d", grad.x, in.x.shape);
    require_shape_if(kOp, "grad.weight", "d k", grad.weight, in.weight.shape);
    require_shape_if(kOp, "grad.bias", "d", grad.bias, {in.x.shape[1]});
    require_shape_if(kOp, "grad.initial_state", "s k-1 d", grad.initial_state, state);
    require(!grad.bias || in.bias, kOp, "`grad.bias` is given but `bias` is absent");
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::causal_conv1d_backward(ex, in, grad_y, grad_final_state, grad);
    }
    if constexpr (std::is_same_v<T, float>) {
        cpu::causal_conv1d_backward(ex, in, grad_y, grad_final_state, grad);
    } else {
        fail(ErrorCode::unsupported, kOp, "gradients of bf16 activations need a GPU");
    }
}

template <class T>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y) {
    check_inputs(ex, in);
    const int64_t s = in.x.shape[0], d = in.x.shape[1], k = in.weight.shape[1];
    if (k > 1) require_shape(kOp, "state", "s k-1 d", state, {s, k - 1, d});
    require_shape(kOp, "y", "s d", y, {s, d});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::causal_conv1d_step(ex, in, state, y);
    }
    cpu::causal_conv1d_step(ex, in, state, y);
}

template void causal_conv1d(const Exec&, const CausalConv1dInputs<float>&, View<float, 2>, View<float, 3>);
template void causal_conv1d(const Exec&, const CausalConv1dInputs<bf16>&, View<bf16, 2>, View<bf16, 3>);
template void causal_conv1d_backward(const Exec&, const CausalConv1dInputs<float>&, View<const float, 2>,
                                     View<const float, 3>, const CausalConv1dGradients<float>&);
template void causal_conv1d_backward(const Exec&, const CausalConv1dInputs<bf16>&, View<const bf16, 2>,
                                     View<const float, 3>, const CausalConv1dGradients<bf16>&);
template void causal_conv1d_step(const Exec&, const CausalConv1dInputs<float>&, View<float, 3>,
                                 View<float, 2>);
template void causal_conv1d_step(const Exec&, const CausalConv1dInputs<bf16>&, View<bf16, 3>, View<bf16, 2>);

}  // namespace ssm
