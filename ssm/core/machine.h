// What this machine can do, measured in the running process: the floors that results are compared with.
#pragma once

#include "ssm/core/exec.h"

namespace ssm {

// All with ex.threads threads. ops/linear/linear_rates.h measures the three of them.
struct MachineRates {
    double read_bytes_per_second = 0;
    double f32_flop_per_second = 0, bf16_flop_per_second = 0;  // of large matrix products
};

// Bytes per second when ex.threads threads read memory once by wide loads: the best of several passes over
// 256 MiB on huge pages, each thread reading its part as 1, 4 or 8 runs side by side (the hardware's
// prefetchers get more out of several). Takes about 0.2 seconds.
double measure_read_bandwidth(const Exec& ex);

}  // namespace ssm
