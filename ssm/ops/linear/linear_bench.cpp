// Mamba-130M's matrices. Decoding streams all layers' weights in turn, so none stays in a cache.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "ssm/core/machine.h"
#include "ssm/ops/linear/linear.h"
#include "ssm/ops/linear/linear_rates.h"
#include "tests/support/compare.h"

namespace ssm {
namespace {

constexpr int kThreads = 2;

const Exec& exec() {
    static const Exec ex = make_cpu_exec(kThreads);
    return ex;
}

const MachineRates& rates() {
    static const MachineRates r = [] {
        const MachineRates m = measure_machine(exec());
        std::printf("machine, %d threads: read %.1f GB/s, f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n", kThreads,
                    m.read_bytes_per_second * 1e-9, m.f32_flop_per_second * 1e-9,
                    m.bf16_flop_per_second * 1e-9);
        return m;
    }();
    return r;
}

Tensor random_tensor(test::Random& random, int64_t rows, int64_t columns, DType dtype) {
    return Tensor::from_floats({rows, columns}, random.vector(rows * columns)).to(dtype);
}

// Refuses to time a wrong answer: some outputs against f64.
void check(const Tensor& x, const Tensor& w, const Tensor& y) {
    const Tensor xf = x.to(DType::f32), wf = w.to(DType::f32), yf = y.to(DType::f32);
    const int64_t t = x.dim(0), i = x.dim(1), o = w.dim(0);
    for (int64_t r = 0; r < t; r += std::max<int64_t>(1, t / 3)) {
        for (int64_t c = 0; c < o; c += std::max<int64_t>(1, o / 7)) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < i; ++k) {
                const double term = static_cast<double>(xf.data<float>()[r * i + k]) *
                                    static_cast<double>(wf.data<float>()[c * i + k]);
                sum += term;
                size += term * term;
            }
            const double error = std::abs(static_cast<double>(yf.data<float>()[r * o + c]) - sum);
            if (!(error <= 2e-2 * std::sqrt(size))) {
                std::fprintf(stderr, "wrong answer at [%ld %ld]\n", static_cast<long>(r),
                             static_cast<long>(c));
                std::exit(1);
            }
        }
    }
}

struct Shape2 {
    int64_t o, i;
};

// One pass of t tokens over `copies` distinct weights of each shape.
void decode(benchmark::State& state, const std::vector<Shape2>& shapes, int copies, DType dtype) {
    const int64_t t = state.range(0);
    test::Random random(1);
    std::vector<PackedWeight> weights;
    std::vector<Tensor> xs, ys;
    double bytes = 0;
    for (int c = 0; c < copies; ++c) {
        for (const auto [o, i] : shapes) {
            weights.emplace_back(random_tensor(random, o, i, dtype));
            xs.push_back(random_tensor(random, t, i, DType::f32));
            ys.push_back(Tensor::empty({t, o}));
            bytes += static_cast<double>(weights.back().weight().bytes());
        }
    }
    const auto pass = [&] {
        for (size_t j = 0; j < weights.size(); ++j) linear(exec(), xs[j], weights[j], {}, ys[j]);
    };
    pass();
    for (size_t j = 0; j < shapes.size(); ++j) check(xs[j].to(dtype), weights[j].weight(), ys[j]);
    rates();
    double best = INFINITY;
    for (auto _ : state) {
        const auto start = std::chrono::steady_clock::now();
        pass();
        best =
            std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    const double now = measure_read_bandwidth(exec());  // in the same minute: it drifts
    state.counters["GB/s"] = bytes / best * 1e-9;
    state.counters["read_GB/s"] = now * 1e-9;
    state.counters["%floor"] = 100 * bytes / best / now;
}

// t rows times one weight, all in the caches: arithmetic.
void product(benchmark::State& state, Shape2 shape, DType dtype) {
    const int64_t t = state.range(0);
    test::Random random(1);
    const PackedWeight weight(random_tensor(random, shape.o, shape.i, dtype));
    const Tensor x = random_tensor(random, t, shape.i, dtype), y = Tensor::empty({t, shape.o}, dtype);
    linear(exec(), x, weight, {}, y);
    check(x, weight.weight(), y);
    const double peak = dtype == DType::f32 ? rates().f32_flop_per_second : rates().bf16_flop_per_second;
    double best = INFINITY;
    for (auto _ : state) {
        const auto start = std::chrono::steady_clock::now();
        linear(exec(), x, weight, {}, y);
        best =
            std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    const double flop = 2.0 * static_cast<double>(t * shape.o * shape.i);
    state.counters["GFLOP/s"] = flop / best * 1e-9;
    state.counters["%floor"] = 100 * flop / best / peak;
}

// linear_backward with all three gradients, f32 storage.
void backward(benchmark::State& state, Shape2 shape, MatmulPrecision precision) {
    const int64_t t = state.range(0), o = shape.o, i = shape.i;
    test::Random random(1);
    Exec ex = exec();
    ex.matmul = precision;
    const Tensor x = random_tensor(random, t, i, DType::f32), w = random_tensor(random, o, i, DType::f32),
                 g = random_tensor(random, t, o, DType::f32);
    const Tensor grad_x = Tensor::zeros({t, i}), grad_w = Tensor::zeros({o, i}), grad_b = Tensor::zeros({o});
    const double peak =
        precision == MatmulPrecision::f32 ? rates().f32_flop_per_second : rates().bf16_flop_per_second;
    const auto run = [&] {
        linear_backward(ex, g, x, w, grad_x, grad_w.view<float, 2>(), grad_b.view<float, 1>());
    };
    run();
    Tensor w_transposed = Tensor::empty({i, o});
    for (int64_t r = 0; r < o; ++r)
        for (int64_t c = 0; c < i; ++c) w_transposed.data<float>()[c * o + r] = w.data<float>()[r * i + c];
    check(g, w_transposed, grad_x);
    double best = INFINITY;
    for (auto _ : state) {
        const auto start = std::chrono::steady_clock::now();
        run();
        best =
            std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    const double flop = 4.0 * static_cast<double>(t * o * i);
    state.counters["GFLOP/s"] = flop / best * 1e-9;
    state.counters["%floor"] = 100 * flop / best / peak;
}

void register_all() {
    const auto us = benchmark::kMicrosecond;
    struct Named {
        const char* name;
        std::vector<Shape2> shapes;
        int copies;
    };
    const std::vector<Shape2> layer{{3072, 768}, {80, 1536}, {1536, 48}, {768, 1536}};
    std::vector<Shape2> model;
    for (int l = 0; l < 24; ++l) model.insert(model.end(), layer.begin(), layer.end());
    model.push_back({50280, 768});
    const Named sets[] = {{"head_50280x768", {{50280, 768}}, 1},    {"in_proj_3072x768", {{3072, 768}}, 24},
                          {"x_proj_80x1536", {{80, 1536}}, 240},    {"dt_proj_1536x48", {{1536, 48}}, 400},
                          {"out_proj_768x1536", {{768, 1536}}, 40}, {"mamba_130m", model, 1}};
    for (const DType dtype : {DType::f32, DType::bf16}) {
        const std::string type(name_of(dtype));
        for (const Named& set : sets) {
            auto* b = benchmark::RegisterBenchmark(
                ("decode/" + std::string(set.name) + "/" + type).c_str(),
                [=](benchmark::State& state) { decode(state, set.shapes, set.copies, dtype); });
            b->Arg(1)->Unit(us)->UseRealTime()->MinTime(0.5);
            if (set.copies == 24) b->Arg(2)->Arg(4)->Arg(8);
        }
        for (const auto [o, i] : {Shape2{3072, 768}, Shape2{768, 1536}, Shape2{80, 1536}, Shape2{1536, 48}}) {
            benchmark::RegisterBenchmark(
                ("product/" + std::to_string(o) + "x" + std::to_string(i) + "/" + type).c_str(),
                [=](benchmark::State& state) {
                    product(state, {o, i}, dtype);
                })
                ->Arg(128)
                ->Arg(512)
                ->Unit(us)
                ->UseRealTime()
                ->MinTime(0.2);
        }
    }
    for (const auto precision : {MatmulPrecision::f32, MatmulPrecision::bf16}) {
        for (const auto [o, i] : {Shape2{1024, 256}, Shape2{256, 512}, Shape2{48, 512}, Shape2{512, 16}}) {
            benchmark::RegisterBenchmark(("backward/" + std::to_string(o) + "x" + std::to_string(i) + "/" +
                                          (precision == MatmulPrecision::f32 ? "f32" : "bf16"))
                                             .c_str(),
                                         [=](benchmark::State& state) {
                                             backward(state, {o, i}, precision);
                                         })
                ->Arg(2048)
                ->Unit(us)
                ->UseRealTime()
                ->MinTime(0.2);
        }
    }
}

}  // namespace
}  // namespace ssm

int main(int argc, char** argv) {
    ssm::register_all();
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
}
