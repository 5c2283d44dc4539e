// Time of SSD beside its floors: 2 t (q (g n + h p) + 2 h p n) FLOP at the machine's peak, and for a step the
// bytes of the state. Peak and bandwidth are measured here, in the same run.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "ssm/core/parallel.h"
#include "ssm/ops/ssd/ssd.h"
#include "ssm/ops/ssd/ssd_reference.h"

namespace ssm {
namespace {

using namespace ssm::test;

// All cores, or what SSM_BENCH_THREADS says.
int threads() {
    const char* given = std::getenv("SSM_BENCH_THREADS");
    return given ? std::atoi(given) : 0;
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes per second of reading and writing an array far larger than the caches.
double bandwidth() {
    static const double measured = [] {
        const Exec ex = make_cpu_exec(threads());
        const int64_t count = int64_t{1} << 26;
        const Scratch<float> a(ex, count);
        double best = 0;
        for (int repeat = 0; repeat < 6; ++repeat) {
            const double start = seconds();
            parallel_for(ex, count, 4096, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) a[i] = a[i] * 0.5f + 1.0f;
            });
            if (repeat > 0) best = std::max(best, 8.0 * count / (seconds() - start));
        }
        return best;
    }();
    return measured;
}

// FLOP per second of a core that does nothing but multiply-adds in registers, times the threads. Compiled for
// the baseline instruction set this would be too low, so it is a constant of the machine: FLOP per cycle x
// clock, both given by the environment.
double peak_flops() {
    const char* given = std::getenv("SSM_BENCH_GFLOPS");
    return given ? std::atof(given) * 1e9 : 0.0;
}

struct Shape {
    const char* name;
    int64_t t, sequences, h, p, g, n;
};
constexpr Shape kShapes[] = {
    {"mamba2-130m_prefill512", 512, 1, 24, 64, 1, 128},
    {"mamba2-130m_prefill2048", 2048, 1, 24, 64, 1, 128},
    {"small_h8_n64_t512", 512, 1, 8, 64, 1, 64},
    {"train_h8_n64_4x512", 2048, 4, 8, 64, 1, 64},
};

SsdCase make_case(const Shape& s) {
    SsdCase c{.h = s.h, .p = s.p, .g = s.g, .n = s.n, .initial_state = false};
    c.cu_seqlens.clear();
    for (int64_t i = 0; i <= s.sequences; ++i) c.cu_seqlens.push_back(s.t / s.sequences * i);
    return c;
}

// 2 t (q/2 (g n + h p) + 2 h p n): only the causal half of the products within a chunk is needed.
double forward_flop(const Shape& s, int64_t q) {
    return 2.0 * s.t * (0.5 * q * (s.g * s.n + s.h * s.p) + 2.0 * s.h * s.p * s.n);
}

void report(benchmark::State& state, double flop) {
    state.counters["GFLOP/s"] =
        benchmark::Counter(flop * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
    if (peak_flops() > 0) {
        state.counters["% of floor"] =
            benchmark::Counter(100.0 * flop / peak_flops(), benchmark::Counter::kIsIterationInvariantRate);
    }
}

template <class T>
void forward(benchmark::State& state, const Shape& shape, int64_t chunk) {
    const SsdCase c = make_case(shape);
    SsdArguments<T> arguments(c, random_ssd(c, 1));
    const SsdInputs<T> in = arguments.inputs();
    const Exec ex = make_cpu_exec(threads());
    std::vector<T> y = nan_vector<T>(c.t() * c.h * c.p);
    std::vector<float> final_state = nan_vector(c.s() * c.h * c.p * c.n);
    const auto call = [&] {
        ssd<T>(ex, in, View<T, 3>(y.data(), {c.t(), c.h, c.p}),
               View<float, 4>(final_state.data(), {c.s(), c.h, c.p, c.n}), {}, {.chunk = chunk});
    };
    call();
    static const Shape* verified = nullptr;
    if (verified != &shape) {
        const SsdResult r = reference_ssd(c, arguments.values());
        if (!(relative_l2(y, r.y) <= (std::is_same_v<T, float> ? 1e-5 : 1e-2))) {
            state.SkipWithError("wrong answer");
            return;
        }
        verified = &shape;
    }
    for (auto _ : state) call();
    report(state, forward_flop(shape, chunk));
}

void backward(benchmark::State& state, const Shape& shape, int64_t chunk) {
    const SsdCase c = make_case(shape);
    SsdArguments<float> arguments(c, random_ssd(c, 2));
    const SsdInputs<float> in = arguments.inputs();
    const Exec ex = make_cpu_exec(threads());
    const int64_t chunks = ssd_chunks(c.cu_seqlens, chunk), state_size = c.h * c.p * c.n;
    std::vector<float> y(c.t() * c.h * c.p), states(chunks * state_size);
    std::vector<float> gx(y.size()), gdt(c.t() * c.h), gA(c.h), gB(c.t() * c.g * c.n), gC(gB.size()), gD(c.h);
    std::vector<float> gbias(c.h), grad_y = Random(3).vector(c.t() * c.h * c.p);
    const View<float, 4> states_view(states.data(), {chunks, c.h, c.p, c.n});
    ssd<float>(ex, in, View<float, 3>(y.data(), {c.t(), c.h, c.p}), {}, states_view, {.chunk = chunk});
    SsdGradients<float> grad;
    grad.x = {gx.data(), {c.t(), c.h, c.p}};
    grad.dt = {gdt.data(), {c.t(), c.h}};
    grad.A = {gA.data(), {c.h}};
    grad.B = {gB.data(), {c.t(), c.g, c.n}};
    grad.C = {gC.data(), {c.t(), c.g, c.n}};
    grad.D = {gD.data(), {c.h, 1}};
    grad.dt_bias = {gbias.data(), {c.h}};
    const auto call = [&] {
        ssd_backward<float>(ex, in, states_view, View<const float, 3>(grad_y.data(), {c.t(), c.h, c.p}), {},
                            grad, {.chunk = chunk});
    };
    call();
    // The loss is linear in C, so sum(C grad C) = sum(grad_y (y - D x)).
    const SsdValues<double> v = arguments.values();
    double by_C = 0, by_y = 0;
    for (size_t i = 0; i < gC.size(); ++i) by_C += v.C[i] * static_cast<double>(gC[i]);
    for (size_t i = 0; i < y.size(); ++i) {
        by_y += static_cast<double>(grad_y[i]) * (static_cast<double>(y[i]) - v.D[i / c.p % c.h] * v.x[i]);
    }
    if (!(std::abs(by_C - by_y) <= 1e-4 * std::abs(by_y))) {
        state.SkipWithError("wrong answer");
        return;
    }
    for (auto _ : state) call();
    report(state, 2.0 * forward_flop(shape, chunk));
}

// Rotates over 24 layers' states, as decoding does: they do not stay in the cache.
template <class T>
void step(benchmark::State& state, int64_t sequences) {
    SsdCase c{.h = 24, .p = 64, .g = 1, .n = 128};
    c.cu_seqlens.clear();
    for (int64_t i = 0; i <= sequences; ++i) c.cu_seqlens.push_back(i);
    SsdArguments<T> arguments(c, random_ssd(c, 4));
    const SsdInputs<T> in = arguments.inputs();
    const Exec ex = make_cpu_exec(threads());
    constexpr int64_t kLayers = 24;
    const int64_t size = sequences * c.h * c.p * c.n;
    std::vector<float> states(kLayers * size);
    std::vector<T> y = nan_vector<T>(sequences * c.h * c.p);
    std::copy(in.initial_state.data, in.initial_state.data + size, states.begin());
    const auto call = [&](int64_t layer) {
        ssd_step<T>(ex, in, View<float, 4>(states.data() + layer * size, {sequences, c.h, c.p, c.n}),
                    View<T, 3>(y.data(), {sequences, c.h, c.p}));
    };
    call(0);
    const SsdResult r = reference_ssd(c, arguments.values());
    if (!(relative_l2(y, r.y) <= 1e-2)) {
        state.SkipWithError("wrong answer");
        return;
    }
    int64_t layer = 0;
    for (auto _ : state) call(layer = (layer + 1) % kLayers);
    const double bytes = 8.0 * static_cast<double>(size);
    state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["% of floor"] =
        benchmark::Counter(100.0 * bytes / bandwidth(), benchmark::Counter::kIsIterationInvariantRate);
}

// One thread is timed by its own clock, so that a busy machine tells the truth; several by the wall.
template <class F>
void add(const std::string& name, F f) {
    auto* const b = benchmark::RegisterBenchmark(name.c_str(), f)->Unit(benchmark::kMicrosecond);
    if (threads() != 1) b->UseRealTime();
}

void register_all() {
    for (const Shape& s : kShapes) {
        for (int64_t q : {32, 48, 64, 96, 128, 256}) {
            const std::string suffix = fmt::format("/{}/q{}", s.name, q);
            add("forward_f32" + suffix, [&s, q](benchmark::State& b) { forward<float>(b, s, q); });
            add("forward_bf16" + suffix, [&s, q](benchmark::State& b) { forward<bf16>(b, s, q); });
            add("backward_f32" + suffix, [&s, q](benchmark::State& b) { backward(b, s, q); });
        }
    }
    for (int64_t sequences : {1, 8}) {
        const std::string suffix = fmt::format("/mamba2-130m/s{}", sequences);
        add("step_f32" + suffix, [sequences](benchmark::State& b) { step<float>(b, sequences); });
        add("step_bf16" + suffix, [sequences](benchmark::State& b) { step<bf16>(b, sequences); });
    }
}

const bool kRegistered = (register_all(), true);

}  // namespace
}  // namespace ssm
