// The causal convolution at real shapes. Floor: the bytes of x and y (backward: x, grad_y and grad_x read,
// grad_x written) at the rate of a copy of the same size on the same threads in the same run. Refuses to time
// a wrong answer.
#include "ssm/ops/causal_conv1d/causal_conv1d.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ssm/core/dtype.h"
#include "ssm/core/parallel.h"
#include "ssm/ops/causal_conv1d/causal_conv1d_reference.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

struct Shape {
    int64_t b, l, d, k;
};
constexpr Shape kMamba130mPrefill{1, 512, 1536, 4};
constexpr Shape kMamba2_130mPrefill{1, 512, 1792, 4};
constexpr Shape kTrainSmall{4, 512, 512, 4};
constexpr Shape kMamba130mStep{1, 1, 1536, 4};

template <class T>
struct Data {
    Shape shape;
    int64_t t;
    std::vector<int64_t> cu{0};
    std::vector<T> x, y, state;
    std::vector<float> weight, bias, grad_y, gx, gweight, gbias;
    CausalConv1dInputs<T> in;

    explicit Data(const Shape& s) : shape(s), t(s.b * s.l) {
        for (int64_t i = 0; i < s.b; ++i) cu.push_back(cu.back() + s.l);
        test::Random random(1);
        x = random.vector<T>(t * s.d), y = x, weight = random.vector(s.d * s.k), bias = random.vector(s.d);
        grad_y = random.vector(t * s.d), gx = grad_y, gweight = weight, gbias = bias;
        state.assign(static_cast<size_t>(s.b * (s.k - 1) * s.d), T());
        in.x = {x.data(), {t, s.d}}, in.weight = {weight.data(), {s.d, s.k}};
        in.bias = {bias.data(), {s.d}}, in.cu_seqlens = cu;
    }
    View<T, 2> out() { return {y.data(), {t, shape.d}}; }
    View<T, 3> state_view() { return {state.data(), {shape.b, shape.k - 1, shape.d}}; }
    // Bytes per second of a copy of x to y.
    double copy_rate(const Exec& ex) {
        double best = 0;
        for (int i = 0; i < 200; ++i) {
            const auto start = std::chrono::steady_clock::now();
            parallel_for(ex, t * shape.d, 4096, [&](int64_t begin, int64_t end) {
                std::memcpy(y.data() + begin, x.data() + begin, (end - begin) * sizeof(T));
            });
            benchmark::ClobberMemory();
            const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
            best = std::max(best, 2.0 * static_cast<double>(t * shape.d) * sizeof(T) / time.count());
        }
        return best;
    }
    // Ends the program unless `y` is right.
    void verify() {
        test::ConvReference r;
        r.d = shape.d, r.k = shape.k, r.cu_seqlens = cu;
        r.x = test::to_double(x), r.weight = test::to_double(weight), r.bias = test::to_double(bias);
        r.run();
        const double error = test::relative_l2(y, r.y);
        if (error <= (std::is_same_v<T, float> ? 1e-6 : 5e-3)) return;
        std::fprintf(stderr, "causal_conv1d is wrong: relative error %g\n", error);
        std::exit(1);
    }
};

void report(benchmark::State& state, double bytes, double copy_rate) {
    using benchmark::Counter;
    state.counters["B/s"] = Counter(bytes, Counter::kIsIterationInvariantRate);
    state.counters["%floor"] = Counter(100 * bytes / copy_rate, Counter::kIsIterationInvariantRate);
}

template <class T>
void forward(benchmark::State& state, T, const Shape& shape) {
    const Exec ex = make_cpu_exec(static_cast<int>(state.range(0)));
    Data<T> data(shape);
    const double rate = data.copy_rate(ex);
    causal_conv1d(ex, data.in, data.out(), data.state_view());
    data.verify();
    for (auto _ : state) causal_conv1d(ex, data.in, data.out(), data.state_view());
    report(state, 2.0 * static_cast<double>(data.t * shape.d) * sizeof(T), rate);
}

template <class T>
void backward(benchmark::State& state, T, const Shape& shape) {
    const Exec ex = make_cpu_exec(static_cast<int>(state.range(0)));
    Data<T> data(shape);
    const double rate = data.copy_rate(ex);
    causal_conv1d(ex, data.in, data.out(), data.state_view());
    data.verify();
    CausalConv1dGradients<float> grad;
    grad.x = {data.gx.data(), {data.t, shape.d}}, grad.weight = {data.gweight.data(), {shape.d, shape.k}};
    grad.bias = {data.gbias.data(), {shape.d}};
    const View<const float, 2> grad_y(data.grad_y.data(), {data.t, shape.d});
    for (auto _ : state) causal_conv1d_backward(ex, data.in, grad_y, {}, grad);
    report(state, static_cast<double>(data.t * shape.d) * (12 + sizeof(T)), rate);
}

template <class T>
void step(benchmark::State& state, T, const Shape& shape) {
    const Exec ex = make_cpu_exec(1);
    Data<T> data(shape);
    const double rate = data.copy_rate(ex);
    causal_conv1d_step(ex, data.in, data.state_view(), data.out());
    data.verify();
    for (auto _ : state) causal_conv1d_step(ex, data.in, data.state_view(), data.out());
    const double bytes =
        (2.0 * static_cast<double>(shape.k) * sizeof(T) + 4.0 * static_cast<double>(shape.k));
    report(state, bytes * static_cast<double>(shape.d), rate);
}

BENCHMARK_CAPTURE(forward, mamba130m_f32, 0.0f, kMamba130mPrefill)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(forward, mamba130m_bf16, bf16(), kMamba130mPrefill)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(forward, mamba2_130m_f32, 0.0f, kMamba2_130mPrefill)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(forward, train_f32, 0.0f, kTrainSmall)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(backward, train_f32, 0.0f, kTrainSmall)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK_CAPTURE(step, mamba130m_f32, 0.0f, kMamba130mStep)->UseRealTime();
BENCHMARK_CAPTURE(step, mamba130m_bf16, bf16(), kMamba130mStep)->UseRealTime();

}  // namespace
}  // namespace ssm
