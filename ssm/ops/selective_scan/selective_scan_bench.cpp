// The selective scan at real shapes. Floor: n exponentials per token and channel, at the rate at which
// ExpFast alone runs on the same threads in the same run. Refuses to time a wrong answer.
#include "ssm/ops/selective_scan/selective_scan.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ssm/core/parallel.h"
#include "ssm/ops/selective_scan/selective_scan_reference.h"
#include "tests/support/compare.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/selective_scan/selective_scan_bench.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sum of exp over x [count], count a multiple of 64: out of L1, four independent sums.
float SumExp(const float* x, int64_t count) {
    const hn::CappedTag<float, 16> d;
    const int64_t width = static_cast<int64_t>(hn::Lanes(d));
    auto a = hn::Zero(d), b = a, c = a, e = a;
    for (int64_t i = 0; i < count; i += 4 * width) {
        a = hn::Add(a, ExpFast(d, hn::LoadU(d, x + i)));
        b = hn::Add(b, ExpFast(d, hn::LoadU(d, x + i + width)));
        c = hn::Add(c, ExpFast(d, hn::LoadU(d, x + i + 2 * width)));
        e = hn::Add(e, ExpFast(d, hn::LoadU(d, x + i + 3 * width)));
    }
    return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(SumExp);
namespace {

struct Shape {
    int64_t b, l, d, n;
};
constexpr Shape kMamba130mPrefill{1, 512, 1536, 16};
constexpr Shape kTrainSmall{4, 512, 512, 16};
constexpr Shape kMamba130mStep{1, 1, 1536, 16};

// exp per second on `threads` threads: the best of 20 measurements of about a millisecond.
double measure_exp_rate(int threads) {
    const Exec ex = make_cpu_exec(threads);
    const auto x = test::Random(1).vector(4096, -8.0f, 0.0f);
    constexpr int64_t kRepeats = 1000;
    double best = 0;
    for (int i = 0; i < 20; ++i) {
        const auto start = std::chrono::steady_clock::now();
        parallel_for(ex, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t j = 0; j < (end - begin) * kRepeats; ++j) {
                benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(SumExp)(x.data(), 4096));
                benchmark::ClobberMemory();
            }
        });
        const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
        best = std::max(best, 4096.0 * kRepeats * threads / time.count());
    }
    return best;
}

double exp_rate(int threads) {
    static const double rates[2] = {measure_exp_rate(1), measure_exp_rate(2)};
    return rates[threads - 1];
}

template <class T>
struct Data {
    Shape shape;
    int64_t t, chunks;
    std::vector<int64_t> cu{0};
    std::vector<T> u, delta, z, y;
    std::vector<float> A, B, C, D, bias, states, state, grad_y;
    std::vector<float> gu, gdelta, gA, gB, gC, gD, gz, gbias;
    SelectiveScanInputs<T> in;

    explicit Data(const Shape& s, int64_t chunk = 64) : shape(s), t(s.b * s.l) {
        for (int64_t i = 0; i < s.b; ++i) cu.push_back(cu.back() + s.l);
        chunks = selective_scan_chunks(cu, chunk);
        test::Random random(1);
        u = random.vector<T>(t * s.d), z = random.vector<T>(t * s.d), y = u;
        delta = random.vector<T>(t * s.d, -5.0f, -2.0f), A = random.vector(s.d * s.n, -16.0f, -1.0f);
        B = random.vector(t * s.n), C = random.vector(t * s.n), D = random.vector(s.d);
        bias = random.vector(s.d), grad_y = random.vector(t * s.d);
        states.resize(chunks * s.d * s.n), state.resize(s.b * s.d * s.n);
        gu = gdelta = gz = grad_y, gA = A, gB = B, gC = C, gD = D, gbias = bias;
        in.u = {u.data(), {t, s.d}}, in.z = {z.data(), {t, s.d}}, in.delta = {delta.data(), {t, s.d}};
        in.A = {A.data(), {s.d, s.n}}, in.B = {B.data(), {t, s.n}}, in.C = {C.data(), {t, s.n}};
        in.D = {D.data(), {s.d}}, in.delta_bias = {bias.data(), {s.d}};
        in.cu_seqlens = cu;
    }
    View<T, 2> out() { return {y.data(), {t, shape.d}}; }
    View<float, 3> state_view() { return {state.data(), {shape.b, shape.d, shape.n}}; }
    View<float, 3> states_view() { return {states.data(), {chunks, shape.d, shape.n}}; }
    SelectiveScanGradients<float> gradients() {
        SelectiveScanGradients<float> g;
        g.u = {gu.data(), {t, shape.d}}, g.delta = {gdelta.data(), {t, shape.d}};
        g.z = {gz.data(), {t, shape.d}}, g.A = {gA.data(), {shape.d, shape.n}};
        g.B = {gB.data(), {t, shape.n}}, g.C = {gC.data(), {t, shape.n}};
        g.D = {gD.data(), {shape.d}}, g.delta_bias = {gbias.data(), {shape.d}};
        return g;
    }
    // Ends the program unless `y` is right.
    void verify() {
        test::ScanReference r;
        r.d = shape.d, r.n = shape.n, r.cu_seqlens = cu;
        r.u = test::to_double(u), r.z = test::to_double(z), r.delta = test::to_double(delta);
        r.A = test::to_double(A), r.B = test::to_double(B), r.C = test::to_double(C);
        r.D = test::to_double(D), r.delta_bias = test::to_double(bias);
        r.run();
        const double error = test::relative_l2(y, r.y);
        if (error <= (std::is_same_v<T, float> ? 1e-5 : 1e-2)) return;
        std::fprintf(stderr, "selective_scan is wrong: relative error %g\n", error);
        std::exit(1);
    }
};

// Counters from n exp per token and channel, and the bytes of the inputs and outputs.
void report(benchmark::State& state, const Shape& s, int threads, double bytes) {
    const double exps = static_cast<double>(s.b * s.l * s.d * s.n);
    using benchmark::Counter;
    state.counters["exp/s"] = Counter(exps, Counter::kIsIterationInvariantRate);
    state.counters["B/s"] = Counter(bytes, Counter::kIsIterationInvariantRate);
    state.counters["%floor"] = Counter(100 * exps / exp_rate(threads), Counter::kIsIterationInvariantRate);
}

template <class T>
void forward(benchmark::State& state, T, const Shape& shape, bool keep_states) {
    const int threads = static_cast<int>(state.range(0));
    const Exec ex = make_cpu_exec(threads);
    const int64_t chunk = SelectiveScanOptions{}.chunk;
    Data<T> data(shape, chunk);
    auto call = [&] {
        selective_scan(ex, data.in, data.out(), data.state_view(),
                       keep_states ? data.states_view() : View<float, 3>(), {.chunk = chunk});
    };
    call();
    data.verify();
    for (auto _ : state) call();
    report(state, shape, threads, static_cast<double>(data.t * shape.d) * 4 * sizeof(T));
}

template <class T>
void backward(benchmark::State& state, T, const Shape& shape) {
    const int threads = static_cast<int>(state.range(0));
    const Exec ex = make_cpu_exec(threads);
    const int64_t chunk = SelectiveScanOptions{}.chunk;
    Data<T> data(shape, chunk);
    selective_scan(ex, data.in, data.out(), data.state_view(), data.states_view(), {.chunk = chunk});
    data.verify();
    const SelectiveScanGradients<float> grad = data.gradients();
    for (auto _ : state) {
        selective_scan_backward(ex, data.in, View<const float, 3>(data.states_view()),
                                View<const float, 2>(data.grad_y.data(), {data.t, shape.d}), {}, grad,
                                {.chunk = chunk});
    }
    report(state, shape, threads, static_cast<double>(data.t * shape.d) * (3 * sizeof(T) + 4 + 24));
}

template <class T>
void step(benchmark::State& state, T, const Shape& shape) {
    const int threads = static_cast<int>(state.range(0));
    const Exec ex = make_cpu_exec(threads);
    Data<T> data(shape);
    selective_scan_step(ex, data.in, data.state_view(), data.out());
    data.verify();
    for (auto _ : state) selective_scan_step(ex, data.in, data.state_view(), data.out());
    report(state, shape, threads, static_cast<double>(shape.b * shape.d * shape.n) * 12);
}

BENCHMARK_CAPTURE(forward, mamba130m_f32, 0.0f, kMamba130mPrefill, false)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(forward, mamba130m_bf16, bf16(), kMamba130mPrefill, false)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(forward, train_f32, 0.0f, kTrainSmall, true)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(backward, train_f32, 0.0f, kTrainSmall)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(step, mamba130m_f32, 0.0f, kMamba130mStep)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(step, mamba130m_bf16, bf16(), kMamba130mStep)->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
}  // namespace ssm
#endif  // HWY_ONCE
