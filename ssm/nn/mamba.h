// The Mamba-1 mixer: expand, short causal convolution, selective scan, gate, project back.
//
//   [x; z] = W_in u             x = silu(conv(x))            [delta; B; C] = W_x x
//   delta  = W_dt delta         y = S6(x, softplus(delta + b_dt), A = -exp(A_log), B, C, D) silu(z)
//   out    = W_out y
//
// Source     Gu & Dao 2023. FalconMamba: RMSNorm without weight on delta, B, C before W_dt (Zuo et al. 2024).
// Shapes     u, out [t e]; x, z [t d]; delta (low rank) [t r]; B, C [t n].
#pragma once

#include <optional>

#include "ssm/nn/linear.h"
#include "ssm/nn/mixer.h"
#include "ssm/nn/short_conv.h"

namespace ssm {

struct MambaConfig {
    int64_t e = 768;   // model width
    int64_t d = 1536;  // inner width
    int64_t n = 16;    // state per channel
    int64_t k = 4;     // convolution width
    int64_t r = 48;    // rank of delta
    bool projection_bias = false, conv_bias = true;
    std::optional<float> bcdt_norm_eps;  // RMSNorm without weight on delta, B, C
    // For a new model only:
    double dt_min = 1e-3, dt_max = 1e-1, dt_floor = 1e-4, dt_scale = 1.0;
    int64_t layers = 1;  // W_out starts scaled by 1/sqrt(layers)
};

struct MambaState final : MixerState {
    Tensor conv;  // [s k-1 d], the last inputs of the convolution
    Tensor ssm;   // [s d n] f32, for steps on a GPU bf16 too
    void visit(const std::string& prefix, const std::function<void(const std::string&, Tensor&)>& f) override;
};

class MambaMixer final : public Mixer {
public:
    explicit MambaMixer(const MambaConfig& config);
    Var forward(Ctx& ctx, const Var& u, MixerState* state) override;
    void step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, MixerState& state,
              const Tensor& next) override;
    const Tensor& first_weight() const override { return in_proj_.weight.value(); }
    std::unique_ptr<MixerState> new_state(const Exec& ex, int64_t s, const StateTypes& types) const override;
    void visit(const std::string& prefix, const ParameterVisitor& f) override;

private:
    MambaConfig config_;
    Linear in_proj_, x_proj_, dt_proj_, out_proj_;
    ShortConv conv_;
    Parameter A_log_, D_;
    Var A_;  // -exp(A_log), kept in inference
};

}  // namespace ssm
