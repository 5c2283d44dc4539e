// What the GPU provides. Private to ssm/ops/mamba_step: arguments are already checked.
#pragma once

#include "ssm/ops/mamba_step/mamba_step.h"

namespace ssm::cuda {

void mamba_step(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y);

}  // namespace ssm::cuda
