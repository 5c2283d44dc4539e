// Time of ssd, ssd_backward and ssd_step on a GPU beside their floors: the greater of the bytes that must
// move at 3.02 TB/s (a measured copy) and 2 t (q/2 (g n + h p) + 2 h p n) FLOP at 731 TFLOP/s (a measured
// bf16 product), twice the FLOP backwards. Verifies y and grad C before timing; the step is left to the test.
#include <benchmark/benchmark.h>

#include <chrono>
#include <map>

#include "ssm/ops/ssd/ssd.h"
#include "ssm/ops/ssd/ssd_reference.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

using namespace ssm::test;

constexpr double kBytesPerSecond = 3.02e12, kFlopPerSecond = 731e12;

struct Shape {
    const char* name;
    int64_t sequences, length, h, p, g, n;
    int64_t t() const { return sequences * length; }
};
constexpr Shape kShapes[] = {
    {"mamba2-130m/b8_l2048", 8, 2048, 24, 64, 1, 128},
    {"mamba2-1.3b/b8_l2048", 8, 2048, 64, 64, 1, 128},
    {"mamba2-130m/b1_l2048", 1, 2048, 24, 64, 1, 128},
    {"n256/b8_l2048", 8, 2048, 24, 64, 1, 256},
};

// Random device memory of T[count].
template <class T>
Tensor random_tensor(uint64_t seed, const ssm::Shape& shape, float low = -1.0f, float high = 1.0f) {
    static std::map<std::string, Tensor> made;  // millions of numbers take seconds
    Tensor& t = made[fmt::format("{} {} {} {}", seed, to_string(shape), sizeof(T), low)];
    if (!t) t = on_device(Random(seed).vector<T>(element_count(shape), low, high), shape);
    return t;
}

template <class T>
struct Arguments {
    Tensor x, dt, A, B, C, D, bias, y, states, grad_y, gx, gdt, gA, gB, gC, gD, gbias;
    std::vector<int64_t> cu_seqlens;
    SsdInputs<T> in;

    explicit Arguments(const Shape& s)
        : x(random_tensor<T>(1, {s.t(), s.h, s.p})),
          dt(random_tensor<T>(2, {s.t(), s.h}, -3.0f, 1.5f)),
          A(random_tensor<float>(3, {s.h}, -2.0f, -0.1f)),
          B(random_tensor<T>(4, {s.t(), s.g, s.n})),
          C(random_tensor<T>(5, {s.t(), s.g, s.n})),
          D(random_tensor<float>(6, {s.h, 1})),
          bias(random_tensor<float>(7, {s.h}, -1.0f, 0.0f)),
          y(Tensor::zeros(cuda_exec(), {s.t(), s.h, s.p}, dtype_of<T>)) {
        for (int64_t i = 0; i <= s.sequences; ++i) cu_seqlens.push_back(i * s.length);
        in.x = x.view<const T, 3>();
        in.dt = dt.view<const T, 2>();
        in.A = A.view<const float, 1>();
        in.B = B.view<const T, 3>();
        in.C = C.view<const T, 3>();
        in.D = D.view<const float, 2>();
        in.dt_bias = bias.view<const float, 1>();
        in.cu_seqlens = cu_seqlens;
    }
    void save(const Shape& s, int64_t chunk) {
        states = Tensor::zeros(cuda_exec(), {ssd_chunks(cu_seqlens, chunk), s.h, s.p, s.n});
    }
    // Written, not added to, as in training.
    SsdGradients<T> gradients(const Shape& s) {
        const Exec& ex = cuda_exec();
        grad_y = random_tensor<T>(8, {s.t(), s.h, s.p});
        gx = Tensor::zeros(ex, {s.t(), s.h, s.p}, dtype_of<T>);
        gdt = Tensor::zeros(ex, {s.t(), s.h}, dtype_of<T>);
        gA = Tensor::zeros(ex, {s.h});
        gB = Tensor::zeros(ex, {s.t(), s.g, s.n}, dtype_of<T>);
        gC = Tensor::zeros(ex, {s.t(), s.g, s.n}, dtype_of<T>);
        gD = Tensor::zeros(ex, {s.h, 1});
        gbias = Tensor::zeros(ex, {s.h});
        SsdGradients<T> g{.set = {true, true, true, true}};
        g.x = gx.view<T, 3>();
        g.dt = gdt.view<T, 2>();
        g.A = gA.view<float, 1>();
        g.B = gB.view<T, 3>();
        g.C = gC.view<T, 3>();
        g.D = gD.view<float, 2>();
        g.dt_bias = gbias.view<float, 1>();
        return g;
    }
};

double forward_flop(const Shape& s) {
    return 2.0 * static_cast<double>(s.t() * (32 * (s.g * s.n + s.h * s.p) + 2 * s.h * s.p * s.n));
}

template <class F>
void time_it(benchmark::State& state, double flop, double bytes, const F& call) {
    const Exec& ex = cuda_exec();
    call(0);
    synchronize(ex);
    constexpr int kCalls = 10;
    int64_t which = 0;
    for (auto _ : state) {
        synchronize(ex);
        const auto begin = std::chrono::steady_clock::now();
        for (int i = 0; i < kCalls; ++i) call(which++);
        synchronize(ex);
        state.SetIterationTime(
            std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / kCalls);
    }
    const double floor = std::max(bytes / kBytesPerSecond, flop / kFlopPerSecond);
    const auto rate = benchmark::Counter::kIsIterationInvariantRate;
    state.counters["TFLOP/s"] = benchmark::Counter(flop * 1e-12, rate);
    state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, rate);
    state.counters["% of floor"] = benchmark::Counter(100.0 * floor, rate);
}

// The first sequence against the recurrence in f64, for two heads.
template <class T>
bool right(const Shape& s, const Arguments<T>& a) {
    const auto x = from_device<T>(a.x), dt = from_device<T>(a.dt), B = from_device<T>(a.B),
               C = from_device<T>(a.C);
    const auto A = from_device<float>(a.A), D = from_device<float>(a.D), bias = from_device<float>(a.bias);
    const auto got = from_device<T>(a.y);
    std::vector<float> actual;
    std::vector<double> expected;
    for (const int64_t h : {int64_t{0}, s.h - 1}) {
        std::vector<double> S(static_cast<size_t>(s.p * s.n));
        for (int64_t t = 0; t < std::min<int64_t>(s.length, 300); ++t) {
            const double raw = static_cast<double>(static_cast<float>(dt[t * s.h + h])) + bias[h];
            const double step = std::log1p(std::exp(raw));
            for (int64_t p = 0; p < s.p; ++p) {
                const int64_t at = (t * s.h + h) * s.p + p;
                const double v = static_cast<float>(x[at]);
                double y = D[h] * v;
                for (int64_t n = 0; n < s.n; ++n) {
                    double& z = S[p * s.n + n];
                    z = std::exp(step * A[h]) * z + step * v * static_cast<float>(B[t * s.n + n]);
                    y += z * static_cast<float>(C[t * s.n + n]);
                }
                expected.push_back(y);
                actual.push_back(static_cast<float>(got[at]));
            }
        }
    }
    return relative_l2(actual, expected) <= (std::is_same_v<T, float> ? 1e-5 : 1e-2);
}

// Saves the states of chunks of `chunk` tokens, or none.
template <class T>
void forward(benchmark::State& state, const Shape& s, int64_t chunk = 0) {
    Arguments<T> a(s);
    const bool save = chunk > 0;
    if (save) a.save(s, chunk);
    const auto call = [&](int64_t) {
        ssd<T>(cuda_exec(), a.in, a.y.template view<T, 3>(), {},
               save ? a.states.template view<float, 4>() : View<float, 4>(), {.chunk = save ? chunk : 64});
    };
    call(0);
    if (!right(s, a)) return state.SkipWithError("wrong answer");
    const double bytes = static_cast<double>(2 * a.x.bytes() + a.B.bytes() + a.C.bytes() + a.dt.bytes() +
                                             (save ? a.states.bytes() : 0));
    time_it(state, forward_flop(s), bytes, call);
}

template <class T>
void backward(benchmark::State& state, const Shape& s, int64_t chunk = 64) {
    Arguments<T> a(s);
    a.save(s, chunk);
    const SsdGradients<T> g = a.gradients(s);
    ssd<T>(cuda_exec(), a.in, a.y.template view<T, 3>(), {}, a.states.template view<float, 4>(),
           {.chunk = chunk});
    const auto call = [&](int64_t) {
        ssd_backward<T>(cuda_exec(), a.in, a.states.template view<const float, 4>(),
                        a.grad_y.template view<const T, 3>(), {}, g, {.chunk = chunk});
    };
    call(0);
    // The loss is linear in C, so sum(C grad C) = sum(grad_y (y - D x)).
    const auto C = from_device<T>(a.C), x = from_device<T>(a.x), y = from_device<T>(a.y);
    const auto gC = from_device<T>(a.gC), gy = from_device<T>(a.grad_y);
    const auto D = from_device<float>(a.D);
    double by_C = 0, by_y = 0, size = 0;
    for (size_t i = 0; i < C.size(); ++i)
        by_C += static_cast<double>(static_cast<float>(C[i]) * static_cast<float>(gC[i]));
    for (size_t i = 0; i < y.size(); ++i) {
        const double v = static_cast<float>(gy[i]) * (static_cast<double>(static_cast<float>(y[i])) -
                                                      D[i / s.p % s.h] * static_cast<float>(x[i]));
        by_y += v;
        size += v * v;
    }
    if (!(std::abs(by_C - by_y) <= 2e-2 * std::sqrt(size))) return state.SkipWithError("wrong answer");
    // x, dt, B, C, grad y, states read; grad x, dt, B, C written.
    const double bytes = static_cast<double>(a.x.bytes() + a.grad_y.bytes() + a.states.bytes() +
                                             a.gx.bytes() + 2 * (a.B.bytes() + a.C.bytes() + a.dt.bytes()));
    time_it(state, 2.0 * forward_flop(s), bytes, call);
}

template <class T>
void step(benchmark::State& state, int64_t sequences, int64_t h) {
    const Shape s{"", 1, sequences, h, 64, 1, 128};
    Arguments<T> a(s);
    const int64_t layers = std::max<int64_t>(2, (int64_t{1} << 28) / (sequences * h * 64 * 128 * 4));
    const Tensor states = Tensor::zeros(cuda_exec(), {layers * sequences, h, 64, 128});
    const auto call = [&](int64_t i) {
        const int64_t at = i % layers * sequences;
        ssd_step<T>(cuda_exec(), a.in, states.rows(at, at + sequences).view<float, 4>(),
                    a.y.template view<T, 3>());
    };
    time_it(state, 0.0, 8.0 * static_cast<double>(sequences * h * 64 * 128), call);
}

void add(const std::string& name, std::function<void(benchmark::State&)> f) {
    benchmark::RegisterBenchmark(name.c_str(), std::move(f))
        ->Unit(benchmark::kMicrosecond)
        ->UseManualTime()
        ->MinTime(0.2);
}

void register_all() {
    for (const Shape& s : kShapes) {
        const std::string name = std::string("/") + s.name;
        add("forward_bf16" + name, [&s](benchmark::State& b) { forward<bf16>(b, s); });
        for (const int64_t chunk : {64, 512, 2048}) {
            const std::string saved = fmt::format("_save{}_bf16", chunk) + name;
            add("forward" + saved, [&s, chunk](benchmark::State& b) { forward<bf16>(b, s, chunk); });
            add("backward" + saved, [&s, chunk](benchmark::State& b) { backward<bf16>(b, s, chunk); });
        }
        if (s.h > 24) continue;
        add("forward_f32" + name, [&s](benchmark::State& b) { forward<float>(b, s); });
        add("backward_f32" + name, [&s](benchmark::State& b) { backward<float>(b, s); });
    }
    for (const int64_t sequences : {1, 8, 64}) {
        for (const int64_t h : {24, 64}) {
            add(fmt::format("step_bf16/s{}_h{}", sequences, h),
                [=](benchmark::State& b) { step<bf16>(b, sequences, h); });
        }
    }
}

const bool kRegistered = (register_all(), true);

}  // namespace
}  // namespace ssm
