// [512 1536], a gate of Mamba-130M, and [4096 1536], beyond the caches.
#include "ssm/ops/elementwise/elementwise.h"

#include "ssm/core/dtype.h"
#include "tests/support/bench.h"

namespace ssm {
namespace {

using View2 = View<const float, 2>;

struct Data {
    int64_t t, d;
    test::Random random{1};
    test::Buffer<float> a{random.vector(t * d, -4, 4)}, b{random.vector(t * d, -4, 4)},
        y{test::nan_vector(t * d)};
    test::Buffer<bf16> half{test::to_bf16(a.values())};

    View2 input() const { return {a.data(), {t, d}}; }
    View2 other() const { return {b.data(), {t, d}}; }
    View<float, 2> output() const { return {y.data(), {t, d}}; }
};

// f(data) writes y = exact(a, b).
template <class F, class G>
void run(benchmark::State& state, double bytes, F f, G exact) {
    const Data data{.t = state.range(0), .d = state.range(1)};
    std::vector<double> expected;
    for (size_t i = 0; i < data.a.size(); ++i) {
        expected.push_back(exact(static_cast<double>(data.a[i]), static_cast<double>(data.b[i])));
    }
    f(data);
    test::require_right(data.y, expected, 5e-3);
    for (auto _ : state) f(data);
    test::report_bytes(state, bytes * static_cast<double>(data.a.size()));
}

void neg_exp(benchmark::State& state) {
    run(
        state, 8, [](const Data& s) { ssm::neg_exp(test::bench_exec(), s.input(), s.output()); },
        [](double a, double) { return -std::exp(a); });
}
void silu(benchmark::State& state) {
    run(
        state, 8, [](const Data& s) { ssm::silu(test::bench_exec(), s.input(), s.output()); },
        [](double a, double) { return a / (1 + std::exp(-a)); });
}
void softplus(benchmark::State& state) {
    run(
        state, 8, [](const Data& s) { ssm::softplus(test::bench_exec(), s.input(), s.output()); },
        [](double a, double) { return std::log1p(std::exp(a)); });
}
void multiply(benchmark::State& state) {
    run(
        state, 12, [](const Data& s) { ssm::multiply(test::bench_exec(), s.input(), s.other(), s.output()); },
        [](double a, double b) { return a * b; });
}
void silu_backward(benchmark::State& state) {
    run(
        state, 16,
        [](const Data& s) {
            if (std::isnan(s.y[0])) std::fill_n(s.y.data(), s.y.size(), 0.0f);
            ssm::silu_backward(test::bench_exec(), s.input(), s.other(), s.output());
        },
        [](double a, double b) {
            const double s = 1 / (1 + std::exp(-a));
            return b * s * (1 + a * (1 - s));
        });
}
void cast_up(benchmark::State& state) {
    run(
        state, 6,
        [](const Data& s) {
            ssm::cast<bf16, float>(test::bench_exec(), {s.half.data(), {s.t, s.d}}, s.output());
        },
        [](double a, double) { return a; });
}
void cast_down(benchmark::State& state) {
    run(
        state, 6,
        [](const Data& s) {
            ssm::cast<float, bf16>(test::bench_exec(), s.input(), {s.half.data(), {s.t, s.d}});
            if (std::isnan(s.y[0])) {  // the first call, which is checked
                for (size_t i = 0; i < s.y.size(); ++i) s.y[i] = static_cast<float>(s.half[i]);
            }
        },
        [](double a, double) { return a; });
}

BENCHMARK(neg_exp)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(silu)->Args({1, 1536})->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(softplus)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(multiply)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(silu_backward)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(cast_up)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();
BENCHMARK(cast_down)->Args({512, 1536})->Args({4096, 1536})->UseRealTime();

}  // namespace
}  // namespace ssm
