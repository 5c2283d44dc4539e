// What the benchmarks on a GPU share: time by events around a batch of calls, bytes per second against what a
// device copy moves.
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ssm/core/cuda/context.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm::test {

// Bytes per second, reads and writes, of a device copy on an H100: a machine constant, not measured in this
// run.
inline constexpr double kCopyRate = 3.02e12;

template <class T>
Tensor random_on_device(uint64_t seed, const Shape& shape) {
    return on_device(Random(seed).vector<T>(element_count(shape)), shape);
}

// A benchmark does not time a wrong answer.
template <class T, class B>
void require_right_on_device(const Tensor& actual, const std::vector<B>& expected, double tolerance) {
    const double error = relative_l2(from_device<T>(actual), expected);
    if (error <= tolerance) return;
    std::fprintf(stderr, "wrong answer: relative L2 error %g\n", error);
    std::exit(1);
}

// Times f(), which moves `bytes`, in batches of 20 so that launches overlap with work.
template <class F>
void time_on_device(benchmark::State& state, double bytes, F f) {
    constexpr int kBatch = 20;
    const cudaStream_t stream = cuda::stream_of(cuda_exec());
    cudaEvent_t begin, end;
    cuda::check(cudaEventCreate(&begin), "bench");
    cuda::check(cudaEventCreate(&end), "bench");
    for (auto _ : state) {
        cudaEventRecord(begin, stream);
        for (int i = 0; i < kBatch; ++i) f();
        cudaEventRecord(end, stream);
        cudaEventSynchronize(end);
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, begin, end), "bench");
        state.SetIterationTime(static_cast<double>(ms) * 1e-3 / kBatch);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    using benchmark::Counter;
    state.counters["bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
    state.counters["%floor"] = Counter(100 * bytes / kCopyRate, Counter::kIsIterationInvariantRate);
}

inline void register_on_device(const std::string& name, void (*f)(benchmark::State&)) {
    benchmark::RegisterBenchmark(name.c_str(), f)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(15);
}

}  // namespace ssm::test
