// Linear layer: y = x W^T + bias; W [o i].
#pragma once

#include "ssm/autograd/derivatives.h"
#include "ssm/nn/parameter.h"

namespace ssm {

class Linear {
public:
    Linear() = default;
    // `init_scale` multiplies the usual bound 1/sqrt(i) (kaiming-uniform with a = sqrt 5, PyTorch's default).
    Linear(int64_t in, int64_t out, bool bias, double init_scale = 1.0);

    // [t i] -> [t o]; `out` is the type of the result.
    Var forward(Ctx& ctx, const Var& x, DType out = DType::f32);
    // The same with the bias left out, for an operator that adds it itself.
    Var forward_no_bias(Ctx& ctx, const Var& x, DType out = DType::f32);
    void visit(const std::string& prefix, const ParameterVisitor& f);

    Parameter weight, bias;

private:
    Var apply(Ctx& ctx, const Var& x, const Var& b, DType out);
    PackedWeight packed_;  // made at the first product without a tape
};

}  // namespace ssm
