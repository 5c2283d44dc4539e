// What the benchmarks of bandwidth-bound operators share.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ssm/core/machine.h"
#include "tests/support/compare.h"

namespace ssm::test {

// Two threads, or as many as SSM_BENCH_THREADS says.
inline const Exec& bench_exec() {
    static const Exec ex = [] {
        const char* threads = std::getenv("SSM_BENCH_THREADS");
        return make_cpu_exec(threads != nullptr ? std::atoi(threads) : 2);
    }();
    return ex;
}

// Memory as a Tensor has it: aligned, on huge pages when large. With 4 KiB pages the same kernels take up to
// twice the time (measured on rms_norm).
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(const std::vector<T>& values) : Buffer(values.data(), values.size()) {}
    Buffer(const Buffer& other) : Buffer(other.data(), other.size()) {}
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free_aligned(bytes_, count_ * sizeof(T)); }
    T* data() const { return reinterpret_cast<T*>(bytes_); }
    size_t size() const { return count_; }
    T& operator[](size_t i) const { return data()[i]; }
    std::vector<T> values() const { return std::vector<T>(data(), data() + count_); }

private:
    Buffer(const T* from, size_t count) : count_(count), bytes_(allocate_aligned(count * sizeof(T))) {
        std::copy_n(from, count, data());
    }
    size_t count_ = 0;
    std::byte* bytes_ = nullptr;
};

// A benchmark does not time a wrong answer.
template <class A, class B>
void require_right(const Buffer<A>& actual, const std::vector<B>& expected, double tolerance) {
    const double error = relative_l2(actual.values(), expected);
    if (error <= tolerance) return;
    std::fprintf(stderr, "wrong answer: relative L2 error %g\n", error);
    std::exit(1);
}

// Bytes per second, and the share of the time that reading as many bytes takes on this machine (measured in
// this process): the floor of an operator that moves `bytes` per iteration. Writes count like reads.
inline void report_bytes(benchmark::State& state, double bytes) {
    static const double bandwidth = [] {
        const double b = measure_read_bandwidth(bench_exec());
        std::printf("machine, %d threads: read %.1f GB/s\n", bench_exec().threads, b * 1e-9);
        return b;
    }();
    using benchmark::Counter;
    state.counters["bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
    state.counters["%floor"] = Counter(100 * bytes / bandwidth, Counter::kIsIterationInvariantRate);
}

}  // namespace ssm::test
