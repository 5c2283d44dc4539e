// What the benchmarks on a GPU share. Calls are timed as they run in a captured graph, without the host's
// share of a launch, and compared with what the machine can do.
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

// Measured on an H100 SXM: what a device copy moves, reads and writes; bf16 products; f32 is the data
// sheet's.
inline constexpr double kCopyBytes = 3.02e12, kBf16Flops = 731e12, kF32Flops = 67e12;

// --- inputs -------------------------------------------------------------------------------------------

template <class T>
Tensor random_on_device(uint64_t seed, const Shape& shape) {
    return on_device(Random(seed).vector<T>(element_count(shape)), shape);
}

// For the largest: a million random numbers over and over.
template <class T>
Tensor large_random(const Shape& shape, float scale = 1.0f) {
    static const std::vector<float> pattern = Random(9).vector(1000003);
    std::vector<T> values(static_cast<size_t>(element_count(shape)));
    for (size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<T>(scale * pattern[i % pattern.size()]);
    return on_device(values, shape);
}

// --- a benchmark does not time a wrong answer ---------------------------------------------------------

inline void require_close(double actual, double expected, double tolerance) {
    if (std::abs(actual - expected) <= tolerance) return;  // NaN is not
    std::fprintf(stderr, "wrong answer: %g where %g was expected\n", actual, expected);
    std::exit(1);
}

template <class T, class B>
void require_right_on_device(const Tensor& actual, const std::vector<B>& expected, double tolerance) {
    const double error = relative_l2(from_device<T>(actual), expected);
    if (error <= tolerance) return;
    std::fprintf(stderr, "wrong answer: relative L2 error %g\n", error);
    std::exit(1);
}

// --- time ---------------------------------------------------------------------------------------------

// Each iteration is f(0) .. f(calls - 1), replayed from a graph; its time is that of one call.
template <class F>
void time_graph(benchmark::State& state, int calls, F f) {
    const cudaStream_t stream = cuda::stream_of(cuda_exec());
    cudaEvent_t begin = nullptr, end = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    f(0);  // what is made once, is made now
    synchronize(cuda_exec());
    cuda::check(cudaEventCreate(&begin), "bench");
    cuda::check(cudaEventCreate(&end), "bench");
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "bench");
    for (int i = 0; i < calls; ++i) f(i);
    cuda::check(cudaStreamEndCapture(stream, &graph), "bench");
    cuda::check(cudaGraphInstantiate(&replay, graph, 0), "bench");
    for (int i = 0; i < 3; ++i) cuda::check(cudaGraphLaunch(replay, stream), "bench");
    for (auto _ : state) {
        cudaEventRecord(begin, stream);
        cuda::check(cudaGraphLaunch(replay, stream), "bench");
        cudaEventRecord(end, stream);
        cuda::check(cudaEventSynchronize(end), "bench");
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, begin, end), "bench");
        state.SetIterationTime(static_cast<double>(ms) * 1e-3 / calls);
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
}

// `unit` "bytes/s" or "FLOP/s", and % of the floor of the time.
inline void report_rate(benchmark::State& state, const char* unit, double amount, double best) {
    using benchmark::Counter;
    state.counters[unit] = Counter(amount, Counter::kIsIterationInvariantRate, Counter::kIs1000);
    state.counters["%floor"] = Counter(100 * amount / best, Counter::kIsIterationInvariantRate);
}

// f(), which moves `bytes`, twenty times over the same memory.
template <class F>
void time_on_device(benchmark::State& state, double bytes, F f) {
    time_graph(state, 20, [&](int) { f(); });
    report_rate(state, "bytes/s", bytes, kCopyBytes);
}

inline void register_on_device(const std::string& name, void (*f)(benchmark::State&)) {
    benchmark::RegisterBenchmark(name.c_str(), f)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(15);
}

}  // namespace ssm::test
