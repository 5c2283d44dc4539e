// What this machine can do, measured in the running process: the floors that results are compared with.
#pragma once

#include <string>
#include <vector>

#include "ssm/core/exec.h"

namespace ssm {

// All with ex.threads threads. ops/linear/linear_rates.h measures the three of them.
struct MachineRates {
    double read_bytes_per_second = 0;
    double f32_flop_per_second = 0, bf16_flop_per_second = 0;  // of large matrix products
};

struct Gpu {
    std::string name;
    int major = 0, minor = 0;  // compute capability
    int multiprocessors = 0;
    size_t memory_bytes = 0;
};
// The GPUs that this build can see. None: `why` says why.
std::vector<Gpu> list_gpus(std::string& why);

// The instruction set that the CPU kernels chose, as Highway names it.
std::string instruction_set();

// Bytes per second when ex.threads threads read memory once by wide loads: the best of several passes over
// 256 MiB on huge pages, each thread reading its part as 1, 4 or 8 runs side by side (the hardware's
// prefetchers get more out of several). Takes about 0.2 seconds.
double measure_read_bandwidth(const Exec& ex);

}  // namespace ssm
