#include "ssm/ops/norm_linear/norm_linear.h"

#include "ssm/core/prefetch.h"
#include "ssm/ops/norm_linear/norm_linear_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "norm_linear";

void check_types(const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end) {
    const DType w = in.weight.weight().dtype(), x = in.x.dtype();
    require(x == DType::f32 || (x == DType::bf16 && w == DType::bf16), kOp,
            "`x` must be f32, or bf16 with a bf16 weight, but is {}", name_of(x));
    require(y.dtype() == DType::f32 || (y.dtype() == DType::bf16 && w == DType::bf16 && !end.add), kOp,
            "`y` must be f32, or bf16 with a bf16 weight where nothing is added, but is {}",
            name_of(y.dtype()));
    require(!in.z || (in.z.dtype() == w && x == w), kOp, "`x` and `z` must be {} like the weight",
            name_of(w));
    require(!end.conv || end.conv->state.dtype() == y.dtype(), kOp, "the state must be {} like `y`",
            name_of(y.dtype()));
}

void check(const Exec& ex, const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end) {
    require_device(kOp, ex);
    require(static_cast<bool>(in.x) && static_cast<bool>(in.weight) && static_cast<bool>(y), kOp,
            "`x`, `weight` or `y` is absent");
    const int64_t t = in.x.dim(0), o = in.weight.weight().dim(0), i = in.weight.weight().dim(1);
    require(in.x.rank() == 2 && in.x.dim(1) == i, kOp, "`x` must be [t i] = [any, {}] but is {}", i,
            to_string(in.x.shape()));
    require(y.rank() == 2 && y.dim(0) == t && y.dim(1) == o, kOp, "`y` must be [t o] = [{}, {}] but is {}", t,
            o, to_string(y.shape()));
    require_shape_if(kOp, "bias", "o", in.bias, {o});
    require_shape_if(kOp, "norm_weight", "i", in.norm_weight, {i});
    const bool gated = in.norm && in.norm->gate != RmsNormOptions::Gate::none;
    require(gated == static_cast<bool>(in.z), kOp, "`z` must be present exactly when gated");
    require(!in.z || in.z.shape() == in.x.shape(), kOp, "`z` must be {} but is {}", to_string(in.x.shape()),
            to_string(in.z.shape()));
    require(!in.norm || (in.norm->groups > 0 && i % in.norm->groups == 0), kOp,
            "the groups do not divide i = {}", i);
    check_types(in, y, end);
    if (!end.conv) return;
    const ConvStep& c = *end.conv;
    require(!end.add, kOp, "a convolution's outputs cannot be added");
    require(c.weight && c.weight.shape[1] >= 1, kOp, "the convolution's `weight` must be [d k]");
    const int64_t d = c.weight.shape[0], k = c.weight.shape[1];
    require(c.first >= 0 && c.first + d <= o, kOp, "columns {} .. {} are outside y's {}", c.first,
            c.first + d, o);
    require_shape_if(kOp, "conv.bias", "d", c.bias, {d});
    require(c.state.rank() == 3 && (c.slots || c.state.dim(0) == t) && c.state.dim(1) == k - 1 &&
                c.state.dim(2) == d,
            kOp, "the state must be [t k-1 d] = [{}, {}, {}] but is {}", t, k - 1, d,
            to_string(c.state.shape()));
    require_slots(kOp, ex.device == Device::cpu, c.slots, t, c.state.dim(0));
}

// rms_norm into a tensor of the weight's type.
Tensor normed(const Exec& ex, const NormLinearInputs& in) {
    const DType type = in.weight.weight().dtype();
    const Tensor v = Tensor::empty(ex, in.x.shape(), type);
    const auto run = [&]<class X, class Y>() {
        rms_norm<X, Y>(ex, {in.x.view<const X, 2>(), in.norm_weight, in.z.view_if<const Y, 2>()},
                       v.view<Y, 2>(), {}, *in.norm);
    };
    if (in.x.dtype() == DType::bf16) {
        run.operator()<bf16, bf16>();
    } else {
        dispatch_activation(type, kOp, [&]<class Y>() { run.template operator()<float, Y>(); });
    }
    return v;
}

}  // namespace

void norm_linear(const Exec& ex, const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end) {
    check(ex, in, y, end);
    if (y.size() == 0) return;
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda && cuda::norm_linear(ex, in, y, end)) return;
    }
    const Tensor v = in.norm ? normed(ex, in) : in.x;
    const Prefetch prefetch(ex);
    if (end.add) {
        linear_add(ex, v, in.weight, in.bias, y.view<float, 2>());
    } else {
        linear(ex, v, in.weight, in.bias, y);
    }
    if (end.next) prefetch.bring(ex, end.next);
    if (!end.conv) return;
    const ConvStep& c = *end.conv;
    const Tensor x = y.columns(c.first, c.first + c.weight.shape[0]);
    dispatch_activation(y.dtype(), kOp, [&]<class T>() {
        causal_conv1d_step<T>(ex, {x.view<const T, 2>(), c.weight, c.bias, {}, {}, c.activation, c.slots},
                              c.state.view<T, 3>(), x.view<T, 2>());
    });
}

}  // namespace ssm
