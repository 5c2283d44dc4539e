#include "ssm/nn/linear.h"

#include <cmath>

namespace ssm {

std::function<void(Random&, const Tensor&)> init::dt_bias(double dt_min, double dt_max, double dt_floor) {
    return [=](Random& random, const Tensor& t) {
        for (int64_t i = 0; i < t.size(); ++i) {
            const double dt =
                std::max(std::exp(random.uniform(std::log(dt_min), std::log(dt_max))), dt_floor);
            t.data<float>()[i] = static_cast<float>(dt + std::log(-std::expm1(-dt)));
        }
    };
}

Linear::Linear(int64_t in, int64_t out, bool with_bias, double init_scale) {
    const double bound = init_scale / std::sqrt(static_cast<double>(in));
    weight = {{out, in}, Parameter::Kind::matrix, true, init::uniform(bound), {}};
    if (with_bias) bias = {{out}, Parameter::Kind::vector, false, init::constant(0.0f), {}};
}

Var Linear::apply(Ctx& ctx, const Var& x, const Var& b, DType out) {
    if (!ctx.inference()) {
        packed_ = {};  // the weight is about to change
        return linear(ctx, x, weight.var, b, out);
    }
    if (!packed_ || packed_.weight().raw() != weight.value().raw()) packed_ = PackedWeight(weight.value());
    Tensor y = Tensor::empty(ctx.exec, {x.value().dim(0), weight.value().dim(0)}, out);
    linear(ctx.exec, x.value(), packed_, b ? b.value().view<const float, 1>() : View<const float, 1>{}, y);
    return Var(y);
}

Var Linear::forward(Ctx& ctx, const Var& x, DType out) { return apply(ctx, x, bias.var, out); }
Var Linear::forward_no_bias(Ctx& ctx, const Var& x, DType out) { return apply(ctx, x, Var(), out); }

void Linear::visit(const std::string& prefix, const ParameterVisitor& f) {
    f(prefix + ".weight", weight);
    if (bias) f(prefix + ".bias", bias);
}

}  // namespace ssm
