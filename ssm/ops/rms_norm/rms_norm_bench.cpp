// Mamba-130M (d 768 between blocks) and Mamba-2-130M (gated, d 1536): prompts and training rotate through
// more memory than the caches hold, decoding finds its row in the cache as it does between two layers.
#include "ssm/ops/rms_norm/rms_norm.h"

#include "ssm/core/dtype.h"
#include "tests/support/bench.h"

namespace ssm {
namespace {

using Gate = RmsNormOptions::Gate;

template <class X, class Y>
struct Data {
    int64_t t, d;
    RmsNormOptions options;
    test::Random random{1};
    test::Buffer<X> x{random.vector<X>(t * d)};
    test::Buffer<Y> z{random.vector<Y>(t * d)}, y{test::nan_vector<Y>(t * d)};
    test::Buffer<float> residual{random.vector(t * d)}, weight{random.vector(d)}, rstd{test::nan_vector(t)};
    test::Buffer<float> grad_y{random.vector(t * d)}, grad_x{grad_y}, grad_z{grad_y}, grad_weight{weight};

    Data(int64_t rows, int64_t width, Gate gate) : t(rows), d(width), options{.gate = gate} {}
    RmsNormInputs<X, Y> inputs() const {
        RmsNormInputs<X, Y> in{{x.data(), {t, d}}, {weight.data(), {d}}, {}};
        if (options.gate != Gate::none) in.z = {z.data(), {t, d}};
        return in;
    }
    void forward() const {
        rms_norm<X, Y>(test::bench_exec(), inputs(), {y.data(), {t, d}}, {rstd.data(), {t, 1}}, options);
    }
    void add() const {
        add_rms_norm<X, Y>(test::bench_exec(), {residual.data(), {t, d}}, {x.data(), {t, d}},
                           {weight.data(), {d}}, {residual.data(), {t, d}}, {y.data(), {t, d}}, {});
    }
    void backward() const {
        RmsNormGradients<float, float> grad{{grad_x.data(), {t, d}}, {grad_weight.data(), {d}}, {}};
        if (options.gate != Gate::none) grad.z = {grad_z.data(), {t, d}};
        rms_norm_backward<X, Y>(test::bench_exec(), inputs(), {rstd.data(), {t, 1}}, {grad_y.data(), {t, d}},
                                grad, options);
    }
    void check_forward() const {
        forward();
        std::vector<double> expected;
        for (int64_t i = 0; i < t * d; i += d) {
            std::vector<double> v;
            double sum = 0;
            for (int64_t j = i; j < i + d; ++j) {
                const double gate = static_cast<double>(static_cast<float>(z[static_cast<size_t>(j)]));
                v.push_back(static_cast<double>(static_cast<float>(x[static_cast<size_t>(j)])) *
                            (options.gate == Gate::before ? gate / (1 + std::exp(-gate)) : 1));
                sum += v.back() * v.back();
            }
            for (int64_t j = 0; j < d; ++j) {
                expected.push_back(v[static_cast<size_t>(j)] /
                                   std::sqrt(sum / static_cast<double>(d) + 1e-5) *
                                   static_cast<double>(weight[static_cast<size_t>(j)]));
            }
        }
        test::require_right(y, expected, 5e-3);
    }
};

// Runs `step` on rotating copies that together exceed the caches (one copy when t is 1).
template <class X, class Y, class F>
void run(benchmark::State& state, Gate gate, double bytes_per_element, F step) {
    const int64_t t = state.range(0), d = state.range(1);
    const std::vector<Data<X, Y>> copies(t == 1 ? 1 : 4, Data<X, Y>(t, d, gate));
    for (const auto& c : copies) c.check_forward();
    size_t next = 0;
    for (auto _ : state) {
        step(copies[next]);
        next = (next + 1) % copies.size();
    }
    test::report_bytes(state, static_cast<double>(t * d) * bytes_per_element);
}

template <class X, class Y>
void forward(benchmark::State& state) {
    run<X, Y>(state, Gate::none, sizeof(X) + sizeof(Y), [](const auto& c) { c.forward(); });
}
template <class X, class Y>
void forward_gated(benchmark::State& state) {
    run<X, Y>(state, Gate::before, sizeof(X) + 2 * sizeof(Y), [](const auto& c) { c.forward(); });
}
template <class X, class Y>
void add_forward(benchmark::State& state) {
    run<X, Y>(state, Gate::none, 8 + sizeof(X) + sizeof(Y), [](const auto& c) { c.add(); });
}
template <class X, class Y>
void backward(benchmark::State& state) {
    run<X, Y>(state, Gate::none, sizeof(X) + 12, [](const auto& c) { c.backward(); });
}
template <class X, class Y>
void backward_gated(benchmark::State& state) {
    run<X, Y>(state, Gate::before, sizeof(X) + sizeof(Y) + 20, [](const auto& c) { c.backward(); });
}

BENCHMARK(forward<float, float>)
    ->Args({1, 768})
    ->Args({1, 1536})
    ->Args({512, 768})
    ->Args({4096, 768})
    ->UseRealTime();
BENCHMARK(forward<bf16, bf16>)->Args({1, 768})->Args({4096, 768})->UseRealTime();
BENCHMARK(add_forward<float, float>)->Args({1, 768})->Args({512, 768})->Args({4096, 768})->UseRealTime();
BENCHMARK(add_forward<bf16, bf16>)->Args({1, 768})->Args({4096, 768})->UseRealTime();
BENCHMARK(forward_gated<float, float>)->Args({1, 1536})->Args({512, 1536})->Args({2048, 1536})->UseRealTime();
BENCHMARK(backward<float, float>)->Args({2048, 256})->Args({4096, 768})->UseRealTime();
BENCHMARK(backward_gated<float, float>)->Args({2048, 1536})->UseRealTime();

}  // namespace
}  // namespace ssm
