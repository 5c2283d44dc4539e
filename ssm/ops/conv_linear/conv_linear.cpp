#include "ssm/ops/conv_linear/conv_linear.h"

#include "ssm/ops/conv_linear/conv_linear_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "conv_linear";

void check(const Exec& ex, const Tensor& x, const ConvStep& conv, const PackedWeight& weight,
           const Tensor& y) {
    require_device(kOp, ex);
    require(x && weight && conv.weight && y && conv.state, kOp,
            "`x`, `weight`, the convolution's `weight` or `state`, or `y` is absent");
    require(x.rank() == 2, kOp, "`x` must be [t d] but is {}", to_string(x.shape()));
    const int64_t t = x.dim(0), d = x.dim(1), k = conv.weight.shape[1], o = weight.weight().dim(0);
    require(conv.first == 0, kOp, "the convolution must be of all of `x`");
    require(k >= 1, kOp, "the convolution's `weight` must be [d k] with k >= 1");
    require_shape(kOp, "conv.weight", "d k", conv.weight, {d, k});
    require_shape_if(kOp, "conv.bias", "d", conv.bias, {d});
    require(weight.weight().dim(1) == d, kOp, "`weight` must be [o d] = [any, {}] but is {}", d,
            to_string(weight.weight().shape()));
    require(y.dtype() == DType::f32 && y.shape() == Shape{t, o}, kOp,
            "`y` must be f32 [t o] = [{}, {}] but is {} {}", t, o, name_of(y.dtype()), to_string(y.shape()));
    require(conv.state.dtype() == x.dtype() && conv.state.rank() == 3 &&
                (conv.slots || conv.state.dim(0) == t) && conv.state.dim(1) == k - 1 &&
                conv.state.dim(2) == d,
            kOp, "the state must be {} [t k-1 d] = [{}, {}, {}] but is {} {}", name_of(x.dtype()), t, k - 1,
            d, name_of(conv.state.dtype()), to_string(conv.state.shape()));
    require_slots(kOp, ex.device == Device::cpu, conv.slots, t, conv.state.dim(0));
}

}  // namespace

void conv_linear(const Exec& ex, const Tensor& x, const ConvStep& conv, const PackedWeight& weight,
                 const Tensor& y) {
    check(ex, x, conv, weight, y);
    if (x.dim(0) == 0) return;
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda && cuda::conv_linear(ex, x, conv, weight, y)) return;
    }
    dispatch_activation(x.dtype(), kOp, [&]<class T>() {
        causal_conv1d_step<T>(
            ex, {x.view<const T, 2>(), conv.weight, conv.bias, {}, {}, conv.activation, conv.slots},
            conv.state.view<T, 3>(), x.view<T, 2>());
    });
    linear(ex, x, weight, {}, y);
}

}  // namespace ssm
