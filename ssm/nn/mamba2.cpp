#include "ssm/nn/mamba2.h"

#include <cmath>

#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm {

void Mamba2State::visit(const std::string& prefix,
                        const std::function<void(const std::string&, Tensor&)>& f) {
    f(prefix + ".conv", conv);
    f(prefix + ".ssm", ssm);
}

Mamba2Mixer::Mamba2Mixer(const Mamba2Config& c)
    : config_(c),
      in_proj_(c.e, 2 * c.d() + 2 * c.g * c.n + c.h, c.projection_bias),
      out_proj_(c.d(), c.e, c.projection_bias, 1.0 / std::sqrt(static_cast<double>(c.layers))),
      conv_(c.conv_channels(), c.k, c.conv_bias) {
    const auto init_A_log = [low = c.A_min, high = c.A_max](Random& random, const Tensor& t) {
        for (int64_t i = 0; i < t.size(); ++i) {
            t.data<float>()[i] = static_cast<float>(std::log(random.uniform(low, high)));
        }
    };
    A_log_ = {{c.h}, Parameter::Kind::vector, false, init_A_log, {}};
    D_ = {{c.D_has_hdim ? c.d() : c.h}, Parameter::Kind::vector, false, init::constant(1.0f), {}};
    dt_bias_ = {{c.h}, Parameter::Kind::vector, false, init::dt_bias(c.dt_min, c.dt_max, c.dt_floor), {}};
    norm_weight_ = {{c.d()}, Parameter::Kind::vector, false, init::constant(1.0f), {}};
}

Var Mamba2Mixer::forward(Ctx& ctx, const Var& u, MixerState* state) {
    const auto& c = config_;
    auto* s = static_cast<Mamba2State*>(state);
    const int64_t d = c.d(), gn = c.g * c.n, channels = c.conv_channels();
    const Var projected = in_proj_.forward(ctx, u, ctx.activation);
    const Var z = projected.columns(0, d);
    const Var dt = projected.columns(d + channels, d + channels + c.h);
    const Var before = projected.columns(d, d + channels),
              xBC = conv_.forward(ctx, before, s != nullptr ? &s->conv : nullptr);
    const Var x = xBC.columns(0, d), B = xBC.columns(d, d + gn), C = xBC.columns(d + gn, d + 2 * gn);
    if (!ctx.inference() || !A_) A_ = neg_exp(ctx, A_log_.var);
    const SsdShape shape{c.h, c.p, c.g, c.n, c.dt_limit_min, c.dt_limit_max};
    const Var y = ssd(ctx, {x, dt, A_, B, C, D_.var, dt_bias_.var}, shape, s != nullptr ? &s->ssm : nullptr);
    if (!ctx.inference()) A_ = Var();
    remade(ctx, xBC, [this, before](Ctx& again) { return conv_.forward(again, before, nullptr); });
    const auto gated = [this, y, z](Ctx& any) {
        return rms_norm(any, y, norm_weight_.var, z, gated_norm(), any.activation);
    };
    const Var normed = gated(ctx), out = out_proj_.forward(ctx, normed, ctx.branch());
    remade(ctx, normed, gated);
    return out;
}

RmsNormOptions Mamba2Mixer::gated_norm() const {
    return {.eps = config_.norm_eps,
            .groups = config_.norm_groups,
            .gate = config_.norm_before_gate ? RmsNormOptions::Gate::after : RmsNormOptions::Gate::before};
}

// A large `next` stays where it is: beside out_proj, whose own weight comes from memory here, it made steps
// of a 1.3B model slower (docs/decisions/0007-decoding.md).
void Mamba2Mixer::step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, MixerState& state,
                       const Tensor& next) {
    const auto& c = config_;
    auto& s = static_cast<Mamba2State&>(state);
    const Exec& ex = ctx.exec;
    const int64_t d = c.d(), gn = c.g * c.n, channels = c.conv_channels();
    if (!A_) A_ = neg_exp(ctx, A_log_.var);
    // ssd_step, which is next, asks for its states.
    const Tensor projected = conv_.step(ctx, norm, residual, in_proj_, d, s.conv, /*ask_first=*/false);
    const auto columns = [&](int64_t begin, int64_t count) {
        return Var(projected.columns(begin, begin + count));
    };
    const SsdShape shape{c.h, c.p, c.g, c.n, c.dt_limit_min, c.dt_limit_max};
    const Var y = ssd(ctx,
                      {columns(d, d), columns(d + channels, c.h), A_, columns(2 * d, gn),
                       columns(2 * d + gn, gn), D_.var, dt_bias_.var},
                      shape, &s.ssm);
    norm_linear(ex,
                {.x = y.value(),
                 .norm = gated_norm(),
                 .norm_weight = norm_weight_.value().view<const float, 1>(),
                 .z = projected.columns(0, d),
                 .weight = out_proj_.packed(),
                 .bias = out_proj_.bias_view()},
                residual, {.add = true, .next = large_on_gpu(next) ? Tensor() : next});
}

std::unique_ptr<MixerState> Mamba2Mixer::new_state(const Exec& ex, int64_t s, const StateTypes& types) const {
    auto state = std::make_unique<Mamba2State>();
    state->conv = Tensor::zeros(ex, {s, config_.k - 1, config_.conv_channels()}, types.activation);
    state->ssm = Tensor::zeros(ex, {s, config_.h, config_.p, config_.n}, types.sums);
    return state;
}

void Mamba2Mixer::visit(const std::string& prefix, const ParameterVisitor& f) {
    f(prefix + ".A_log", A_log_);
    f(prefix + ".D", D_);
    f(prefix + ".dt_bias", dt_bias_);
    conv_.visit(prefix + ".conv1d", f);
    f(prefix + ".norm.weight", norm_weight_);
    in_proj_.visit(prefix + ".in_proj", f);
    out_proj_.visit(prefix + ".out_proj", f);
}

}  // namespace ssm
