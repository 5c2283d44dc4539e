// Products of Mamba-130M (d 1536, e 768, v 50288) and Mamba-2: decoding through distinct weights of 256 MB
// and more, so that they come from memory; prefill and training shapes.
#include "ssm/ops/linear/linear.h"

#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

// Some entries of y = x W^T against f64.
void verify(const Tensor& x, const Tensor& w, const Tensor& y, double tolerance) {
    const auto host = [](const Tensor& t) { return (t.dense() ? t : t.clone()).to_host().to(DType::f32); };
    const Tensor a = host(x), c = host(y);
    Random random(4);
    const int64_t i = x.dim(1), o = w.dim(0);
    for (int n = 0; n < 32; ++n) {
        const int64_t row = random.integer(0, x.dim(0) - 1), column = random.integer(0, o - 1);
        const Tensor b = host(w.rows(column, column + 1));
        double sum = 0;
        for (int64_t k = 0; k < i; ++k)
            sum +=
                static_cast<double>(a.data<float>()[row * i + k]) * static_cast<double>(b.data<float>()[k]);
        require_close(static_cast<double>(c.data<float>()[row * o + column]), sum,
                      tolerance * std::sqrt(static_cast<double>(i)));
    }
}

template <class W>
void few_rows(benchmark::State& state) {
    const int64_t t = state.range(0), o = state.range(1), i = state.range(2);
    const auto bytes = static_cast<double>(o * i * static_cast<int64_t>(sizeof(W)));
    const int64_t copies = std::max<int64_t>(3, static_cast<int64_t>(256e6 / bytes));
    const Tensor weights = large_random<W>({copies * o, i}), x = large_random<W>({t, i});
    const Tensor y = on_device(nan_vector(t * o), {t, o});
    const auto weight = [&](int n) { return weights.rows(n * o, (n + 1) * o); };
    linear(cuda_exec(), x, weight(1), {}, y);
    verify(x, weight(1), y, 1e-4);
    time_graph(state, static_cast<int>(copies), [&](int n) { linear(cuda_exec(), x, weight(n), {}, y); });
    report_rate(state, "bytes/s", bytes, kCopyBytes);
}

template <class T>
void many_rows(benchmark::State& state) {
    const int64_t t = state.range(0), o = state.range(1), i = state.range(2);
    const Tensor x = large_random<T>({t, i}), w = large_random<T>({o, i}),
                 y = Tensor::empty(cuda_exec(), {t, o}, dtype_of<T>);
    const auto step = [&](int) { linear(cuda_exec(), x, w, {}, y); };
    step(0);
    verify(x, w, y, sizeof(T) == 2 ? 1e-2 : 1e-4);
    time_graph(state, 10, step);
    report_rate(state, "FLOP/s", static_cast<double>(2 * t * o * i), sizeof(T) == 2 ? kBf16Flops : kF32Flops);
}

// The gradients of x (written) and the weight (added); for dt_proj (1536 x 48) that of the bias, too. All in
// bf16, as training in bf16 has them, or grad_y and the weight in f32 and rounded in the call.
template <class T>
void backward(benchmark::State& state) {
    Exec ex = cuda_exec();
    ex.matmul = MatmulPrecision::bf16;
    const int64_t t = state.range(0), o = state.range(1), i = state.range(2);
    const bool set = state.range(3) != 0;
    const Tensor g = large_random<T>({t, o}), x = large_random<bf16>({t, i}), w = large_random<T>({o, i}),
                 grad_x = Tensor::zeros(ex, {t, i}, DType::bf16), grad_w = Tensor::zeros(ex, {o, i}),
                 grad_b = Tensor::zeros(ex, {o});
    const auto step = [&](int) {
        linear_backward(ex, g, x, w, grad_x, grad_w.view<float, 2>(),
                        i == 48 ? grad_b.view<float, 1>() : View<float, 1>(), {.x = set});
    };
    step(0);
    // grad_x = g W is verified as g (W^T)^T.
    const std::vector<T> w_host = from_device<T>(w);
    std::vector<T> w_t(w_host.size());
    for (int64_t a = 0; a < o; ++a)
        for (int64_t b = 0; b < i; ++b)
            w_t[static_cast<size_t>(b * o + a)] = w_host[static_cast<size_t>(a * i + b)];
    verify(g, on_device(w_t, {i, o}), grad_x, 1e-2);
    if (!set) grad_x.fill_zero();  // it grows without bound otherwise
    time_graph(state, 5, step);
    report_rate(state, "FLOP/s", static_cast<double>(4 * t * o * i), kBf16Flops);
}

void decoding_shapes(benchmark::internal::Benchmark* b) {
    for (const int64_t t : {1, 2, 4, 8})
        for (const auto& [o, i] :
             {std::pair<int64_t, int64_t>{50288, 768}, {3072, 768}, {768, 1536}, {80, 1536}, {1536, 48}})
            b->Args({t, o, i});
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(10);
}
void product_shapes(benchmark::internal::Benchmark* b) {
    for (const int64_t t : {512, 16384})
        for (const auto& [o, i] :
             {std::pair<int64_t, int64_t>{3072, 768}, {768, 1536}, {80, 1536}, {1536, 48}})
            b->Args({t, o, i});
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(10);
}

void gradient_shapes(benchmark::internal::Benchmark* b) {
    for (const int64_t set : {1, 0})
        for (const auto& [o, i] :
             {std::pair<int64_t, int64_t>{3072, 768}, {768, 1536}, {80, 1536}, {1536, 48}})
            b->Args({16384, o, i, set});
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(10);
}

BENCHMARK(few_rows<bf16>)->Apply(decoding_shapes);
BENCHMARK(few_rows<float>)->Apply(decoding_shapes);
BENCHMARK(many_rows<bf16>)->Apply(product_shapes);
BENCHMARK(many_rows<float>)->Apply(product_shapes);
BENCHMARK(backward<bf16>)->Apply(gradient_shapes);
BENCHMARK(backward<float>)->Apply(gradient_shapes);

}  // namespace
}  // namespace ssm
