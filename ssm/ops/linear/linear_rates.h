// The machine's rates, measured in this process: memory by core/machine.h, arithmetic by linear().
#pragma once

#include "ssm/core/dtype.h"
#include "ssm/core/machine.h"

namespace ssm {

// FLOP per second of a [512 1024] x [1024 1024]^T product whose operands stay in the caches, on a GPU of
// [8192 8192] x [8192 8192]^T; the best of several, 0.1 seconds each dtype. In a build without oneDNN: what
// the plain product reaches.
double measure_matrix_rate(const Exec& ex, DType dtype);

// Bytes per second, read and written, of copies of 512 MiB in ex's memory; the best of several. On a GPU:
// what bounds decoding.
double measure_copy_bandwidth(const Exec& ex);

MachineRates measure_machine(const Exec& ex);

}  // namespace ssm
