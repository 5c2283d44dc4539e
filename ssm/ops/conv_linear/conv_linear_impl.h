// What the GPU provides. Private to ssm/ops/conv_linear: arguments are already checked.
#pragma once

#include "ssm/ops/conv_linear/conv_linear.h"

namespace ssm::cuda {

// False: not done, of a kind that the kernel does not know.
bool conv_linear(const Exec& ex, const Tensor& x, const ConvStep& conv, const PackedWeight& weight,
                 const Tensor& y);

}  // namespace ssm::cuda
