#include "ssm/nn/mamba.h"

#include <cmath>

#include "ssm/ops/mamba_step/mamba_step.h"
#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm {
namespace {

// A_log = log(1 .. n) in every row (S4D-Real).
void init_A_log(Random&, const Tensor& t) {
    const int64_t n = t.dim(1);
    for (int64_t i = 0; i < t.size(); ++i) {
        t.data<float>()[i] = static_cast<float>(std::log(static_cast<double>(i % n + 1)));
    }
}

}  // namespace

void MambaState::visit(const std::string& prefix, const std::function<void(const std::string&, Tensor&)>& f) {
    f(prefix + ".conv", conv);
    f(prefix + ".ssm", ssm);
}

MambaMixer::MambaMixer(const MambaConfig& c)
    : config_(c),
      in_proj_(c.e, 2 * c.d, c.projection_bias),
      x_proj_(c.d, c.r + 2 * c.n, false),
      dt_proj_(c.r, c.d, true, c.dt_scale),  // 1/sqrt(r): the published bound
      out_proj_(c.d, c.e, c.projection_bias, 1.0 / std::sqrt(static_cast<double>(c.layers))),
      conv_(c.d, c.k, c.conv_bias) {
    dt_proj_.bias.init = init::dt_bias(c.dt_min, c.dt_max, c.dt_floor);
    A_log_ = {{c.d, c.n}, Parameter::Kind::vector, false, init_A_log, {}};
    D_ = {{c.d}, Parameter::Kind::vector, false, init::constant(1.0f), {}};
}

Var MambaMixer::forward(Ctx& ctx, const Var& u, MixerState* state) {
    const auto& c = config_;
    auto* s = static_cast<MambaState*>(state);
    const Var xz = in_proj_.forward(ctx, u, ctx.activation);
    const Var z = xz.columns(c.d, 2 * c.d);
    const Var x = conv_.forward(ctx, xz.columns(0, c.d), s != nullptr ? &s->conv : nullptr);
    const Var dbc = x_proj_.forward(ctx, x);
    Var delta = dbc.columns(0, c.r), B = dbc.columns(c.r, c.r + c.n),
        C = dbc.columns(c.r + c.n, c.r + 2 * c.n);
    if (c.bcdt_norm_eps) {
        const RmsNormOptions options{.eps = *c.bcdt_norm_eps};
        delta = rms_norm(ctx, delta, Var(), Var(), options, DType::f32);
        B = rms_norm(ctx, B, Var(), Var(), options, DType::f32);
        C = rms_norm(ctx, C, Var(), Var(), options, DType::f32);
    }
    const Var low = ctx.recording({&delta}) ? rounded(ctx, delta) : delta;  // once for three products
    delta = dt_proj_.forward_no_bias(ctx, low, ctx.activation);  // its bias goes through the scan's softplus
    if (!ctx.inference() || !A_) A_ = neg_exp(ctx, A_log_.var);
    const Var y = selective_scan(ctx, {x, delta, A_, B, C, D_.var, z, dt_proj_.bias.var},
                                 s != nullptr ? &s->ssm : nullptr);
    if (!ctx.inference()) A_ = Var();
    remade(ctx, delta,
           [this, low](Ctx& again) { return dt_proj_.forward_no_bias(again, low, again.activation); });
    remade(ctx, x,
           [this, xz](Ctx& again) { return conv_.forward(again, xz.columns(0, config_.d), nullptr); });
    const Var out = out_proj_.forward(ctx, y, ctx.branch());
    forget_scanned(ctx, y);
    return out;
}

void MambaMixer::step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, MixerState& state,
                      const Tensor& next) {
    const auto& c = config_;
    const auto& s = static_cast<MambaState&>(state);
    const Exec& ex = ctx.exec;
    const int64_t t = residual.dim(0);
    if (!A_) A_ = neg_exp(ctx, A_log_.var);
    // x_proj, which is next, has little to ask for.
    const Tensor xz = conv_.step(ctx, norm, residual, in_proj_, 0, s.conv, /*ask_first=*/true);
    const Tensor x = xz.columns(0, c.d), dbc = Tensor::empty(ex, {t, c.r + 2 * c.n}),
                 y = Tensor::empty(ex, {t, c.d}, ctx.activation);
    norm_linear(ex, {.x = x, .weight = x_proj_.packed()}, dbc);
    mamba_step(ex,
               {.x = x,
                .dbc = dbc,
                .z = xz.columns(c.d, 2 * c.d),
                .dt_weight = dt_proj_.packed(),
                .dt_bias = dt_proj_.bias_view(),
                .A = A_.value().view<const float, 2>(),
                .D = D_.value().view<const float, 1>(),
                .norm_eps = c.bcdt_norm_eps,
                .slots = ctx.slots,
                .next = out_proj_.weight.value()},
               s.ssm, y);
    norm_linear(ex, {.x = y, .weight = out_proj_.packed(), .bias = out_proj_.bias_view()}, residual,
                {.add = true, .next = next});
}

std::unique_ptr<MixerState> MambaMixer::new_state(const Exec& ex, int64_t s, const StateTypes& types) const {
    auto state = std::make_unique<MambaState>();
    state->conv = Tensor::zeros(ex, {s, config_.k - 1, config_.d}, types.activation);
    state->ssm = Tensor::zeros(ex, {s, config_.d, config_.n}, types.sums);
    return state;
}

void MambaMixer::visit(const std::string& prefix, const ParameterVisitor& f) {
    f(prefix + ".A_log", A_log_);
    f(prefix + ".D", D_);
    conv_.visit(prefix + ".conv1d", f);
    in_proj_.visit(prefix + ".in_proj", f);
    x_proj_.visit(prefix + ".x_proj", f);
    dt_proj_.visit(prefix + ".dt_proj", f);
    out_proj_.visit(prefix + ".out_proj", f);
}

}  // namespace ssm
