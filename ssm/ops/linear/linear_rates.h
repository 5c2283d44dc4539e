// The machine's rates, measured in this process: memory by core/machine.h, arithmetic by linear().
#pragma once

#include "ssm/core/dtype.h"
#include "ssm/core/machine.h"

namespace ssm {

// FLOP per second of a [512 1024] x [1024 1024]^T product whose operands stay in the caches; the best of
// several, 0.1 seconds each dtype. In a build without oneDNN: what the plain product reaches.
double measure_matrix_rate(const Exec& ex, DType dtype);

MachineRates measure_machine(const Exec& ex);

}  // namespace ssm
