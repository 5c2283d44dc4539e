#include "ssm/nn/short_conv.h"

#include <cmath>

#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm {

ShortConv::ShortConv(int64_t channels, int64_t k, bool bias) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(k));
    weight_ = {{channels, 1, k}, Parameter::Kind::vector, true, init::uniform(bound), {}};
    if (bias) bias_ = {{channels}, Parameter::Kind::vector, false, init::uniform(bound), {}};
}

Var ShortConv::forward(Ctx& ctx, const Var& x, Tensor* state) const {
    return causal_conv1d(ctx, x, weight_.var, bias_.var, Activation::silu, state);
}

Tensor ShortConv::step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, Linear& in_proj,
                       int64_t first, const Tensor& state, bool ask_first) const {
    const Tensor &w = weight_.value(),
                 y = Tensor::empty(ctx.exec, {residual.dim(0), in_proj.weight.value().dim(0)},
                                   ctx.activation);
    const ConvStep conv{.first = first,
                        .weight = w.reshape({w.dim(0), w.dim(2)}).view<const float, 2>(),
                        .bias = bias_ ? bias_.value().view<const float, 1>() : View<const float, 1>{},
                        .state = state,
                        .slots = ctx.slots};
    norm_linear(ctx.exec,
                {.x = residual,
                 .norm = RmsNormOptions{.eps = norm.eps},
                 .norm_weight = norm.weight,
                 .weight = in_proj.packed(),
                 .bias = in_proj.bias_view()},
                y, {.conv = conv, .ask_first = ask_first});
    return y;
}

void ShortConv::visit(const std::string& prefix, const ParameterVisitor& f) {
    f(prefix + ".weight", weight_);
    if (bias_) f(prefix + ".bias", bias_);
}

}  // namespace ssm
