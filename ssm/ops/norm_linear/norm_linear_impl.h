// What the GPU provides. Private to ssm/ops/norm_linear: arguments are already checked.
#pragma once

#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm::cuda {

// In one kernel; false: it does not suit this one.
bool norm_linear(const Exec& ex, const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end);

}  // namespace ssm::cuda
