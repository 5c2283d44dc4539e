// The loss of Mamba-130M's head (one window of 512 tokens) and of a small trained model (batch 4 x 512).
#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/cross_entropy/cross_entropy_reference.h"
#include "ssm/ops/linear/linear_rates.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

struct Problem {
    int64_t t, e, v;
    Tensor hidden, weight;
    std::vector<int32_t> targets;
    std::vector<float> nll, grad_nll;

    Problem(int64_t t_, int64_t e_, int64_t v_) : t(t_), e(e_), v(v_) {
        test::Random random(1);
        hidden = Tensor::from_floats({t, e}, random.vector(t * e));
        weight = Tensor::from_floats({v, e}, random.vector(v * e, -0.3f, 0.3f));
        for (int64_t i = 0; i < t; ++i) targets.push_back(static_cast<int32_t>(random.integer(0, v - 1)));
        nll = test::nan_vector(t);
        grad_nll.assign(static_cast<size_t>(t), 1.0f / static_cast<float>(t));
    }
    View<const int32_t, 1> target_view() const { return {targets.data(), {t}}; }
    View<float, 1> nll_view() { return {nll.data(), {t}}; }

    // Refuses to time a wrong answer: the first token's loss in f64.
    void check(double tolerance) const {
        const double want =
            test::TokenLoss(hidden.data<const float>(), weight.data<const float>(), v, e).nll(targets[0]);
        if (!(std::abs(static_cast<double>(nll[0]) - want) <= tolerance * want)) {
            std::fprintf(stderr, "wrong answer: %g instead of %g\n", static_cast<double>(nll[0]), want);
            std::exit(1);
        }
    }
};

void measure(benchmark::State& state, double flop, double peak, const std::function<void()>& run) {
    double best = INFINITY;
    for (auto _ : state) {
        const auto start = std::chrono::steady_clock::now();
        run();
        best =
            std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    state.counters["GFLOP/s"] = flop / best * 1e-9;
    state.counters["%floor"] = 100 * flop / best / peak;
}

void forward(benchmark::State& state) {
    Problem p(state.range(0), state.range(1), state.range(2));
    const Exec ex = make_cpu_exec(2);
    const PackedWeight packed(p.weight);
    const auto run = [&] { linear_cross_entropy(ex, p.hidden, packed, p.target_view(), p.nll_view()); };
    run();
    p.check(1e-5);
    measure(state, 2.0 * static_cast<double>(p.t * p.e * p.v), measure_matrix_rate(ex, DType::f32), run);
}

void backward(benchmark::State& state) {
    Problem p(state.range(0), state.range(1), state.range(2));
    Exec ex = make_cpu_exec(2);
    const bool round = state.range(3) != 0;
    if (round) ex.matmul = MatmulPrecision::bf16;
    const Tensor grad_h = Tensor::zeros({p.t, p.e}), grad_w = Tensor::zeros({p.v, p.e});
    const auto run = [&] {
        linear_cross_entropy_backward(ex, p.hidden, p.weight, p.target_view(), {p.grad_nll.data(), {p.t}},
                                      p.nll_view(), grad_h, grad_w.view<float, 2>());
    };
    run();
    p.check(round ? 1e-2 : 1e-5);
    measure(state, 6.0 * static_cast<double>(p.t * p.e * p.v),
            measure_matrix_rate(ex, round ? DType::bf16 : DType::f32), run);
}

BENCHMARK(forward)
    ->Args({512, 768, 50280})
    ->Args({2048, 256, 256})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();
BENCHMARK(backward)
    ->ArgNames({"t", "e", "v", "bf16"})
    ->Args({512, 768, 50280, 0})
    ->Args({512, 768, 50280, 1})
    ->Args({2048, 256, 256, 0})
    ->Args({2048, 256, 256, 1})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace ssm
