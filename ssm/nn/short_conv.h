// The short causal convolution of a mixer, one filter of k taps a channel, with SiLU (causal_conv1d.h).
#pragma once

#include "ssm/nn/linear.h"
#include "ssm/nn/mixer.h"

namespace ssm {

class ShortConv {
public:
    ShortConv(int64_t channels, int64_t k, bool bias);

    // [t d] -> [t d]. A state [s k-1 d] holds the last inputs of each sequence and is left at its end.
    Var forward(Ctx& ctx, const Var& x, Tensor* state) const;
    // What the step of a block begins with: in_proj(norm(residual)) [t o], of which the columns from `first`
    // on, as many as there are channels, went through the convolution. ask_first: norm_linear.h.
    Tensor step(Ctx& ctx, const BlockNorm& norm, const Tensor& residual, Linear& in_proj, int64_t first,
                const Tensor& state, bool ask_first) const;
    void visit(const std::string& prefix, const ParameterVisitor& f);

private:
    Parameter weight_, bias_;  // [d 1 k], [d] or absent
};

}  // namespace ssm
