// The Mamba-2 mixer: one projection, short causal convolution over x, B and C, SSD, gated norm, project back.
//
//   [z; x; B; C; dt] = W_in u        [x; B; C] = silu(conv([x; B; C]))
//   y   = SSD(x, clamp(softplus(dt + dt_bias)), A = -exp(A_log), B, C, D)
//   out = W_out RMSNorm(y silu(z))   the gate may also follow the norm
//
// Source     Dao & Gu 2024. The norm's groups: transformers' mamba2 has one, mamba_ssm one per B/C group.
// Shapes     u, out [t e]; z, x [t d], d = h p; B, C [t g n]; dt [t h].
#pragma once

#include <limits>

#include "ssm/nn/linear.h"
#include "ssm/nn/mixer.h"
#include "ssm/nn/short_conv.h"

namespace ssm {

struct Mamba2Config {
    int64_t e = 768, h = 24, p = 64, g = 1, n = 128, k = 4;
    bool projection_bias = false, conv_bias = true;
    bool D_has_hdim = false;  // D is [h p] instead of [h]
    int64_t norm_groups = 1;
    bool norm_before_gate = false;
    float norm_eps = 1e-5f;
    float dt_limit_min = 0.0f, dt_limit_max = std::numeric_limits<float>::infinity();
    // For a new model only:
    double dt_min = 1e-3, dt_max = 1e-1, dt_floor = 1e-4, A_min = 1.0, A_max = 16.0;
    int64_t layers = 1;

    int64_t d() const { return h * p; }
    int64_t conv_channels() const { return d() + 2 * g * n; }
};

struct Mamba2State final : MixerState {
    Tensor conv;  // [s k-1 d+2gn]
    Tensor ssm;   // [s h p n] f32, for steps on a GPU bf16 too
    void visit(const std::string& prefix, const std::function<void(const std::string&, Tensor&)>& f) override;
};

class Mamba2Mixer final : public Mixer {
public:
    explicit Mamba2Mixer(const Mamba2Config& config);
    Var forward(Ctx& ctx, const Var& u, MixerState* state) override;
    void step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, MixerState& state,
              const Tensor& next) override;
    const Tensor& first_weight() const override { return in_proj_.weight.value(); }
    std::unique_ptr<MixerState> new_state(const Exec& ex, int64_t s, const StateTypes& types) const override;
    void visit(const std::string& prefix, const ParameterVisitor& f) override;

private:
    RmsNormOptions gated_norm() const;

    Mamba2Config config_;
    Linear in_proj_, out_proj_;
    ShortConv conv_;
    Parameter A_log_, D_, dt_bias_, norm_weight_;
    Var A_;
};

}  // namespace ssm
