// The step of Mamba-130M's and 1.4B's scan, beside Mamba-2's: states of 256 MB and more in turn.
#include "ssm/ops/mamba_step/mamba_step.h"

#include "ssm/ops/ssd/ssd.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

template <class S>
void mamba(benchmark::State& state) {
    const int64_t t = state.range(0), d = state.range(1), r = state.range(2), n = 16;
    const auto bytes = static_cast<double>(2 * sizeof(S) * t * d * n + 2 * d * r + 4 * d * n + 8 * t * d);
    const int64_t copies = std::max<int64_t>(3, static_cast<int64_t>(256e6 / bytes));
    const Tensor x = large_random<bf16>({t, d}), z = large_random<bf16>({t, d}),
                 dbc = large_random<float>({t, r + 2 * n}),
                 weight = large_random<bf16>({copies * d, r}, 0.1f),
                 A = on_device(std::vector<float>(static_cast<size_t>(d * n), -1.0f), {d, n}),
                 D = large_random<float>({d}), y = Tensor::empty(cuda_exec(), {t, d}, DType::bf16),
                 states = Tensor::zeros(cuda_exec(), {copies * t, d, n}, dtype_of<S>);
    std::vector<PackedWeight> packed;
    for (int64_t c = 0; c < copies; ++c) packed.emplace_back(weight.rows(c * d, (c + 1) * d));
    time_graph(state, static_cast<int>(copies), [&](int c) {
        mamba_step(cuda_exec(),
                   {.x = x,
                    .dbc = dbc,
                    .z = z,
                    .dt_weight = packed[static_cast<size_t>(c)],
                    .dt_bias = D.view<const float, 1>(),
                    .A = A.view<const float, 2>(),
                    .D = D.view<const float, 1>()},
                   states.rows(c * t, (c + 1) * t), y);
    });
    report_rate(state, "bytes/s", bytes, kCopyBytes);
}

template <class S>
void mamba2(benchmark::State& state) {
    const int64_t t = state.range(0), h = state.range(1), p = 64, n = 128;
    const auto bytes = static_cast<double>(2 * sizeof(S) * t * h * p * n + 4 * t * h * p);
    const int64_t copies = std::max<int64_t>(3, static_cast<int64_t>(256e6 / bytes));
    const Tensor x = large_random<bf16>({t, h, p}), dt = large_random<bf16>({t, h}),
                 B = large_random<bf16>({t, 1, n}), C = large_random<bf16>({t, 1, n}),
                 A = on_device(std::vector<float>(static_cast<size_t>(h), -1.0f), {h}),
                 D = large_random<float>({h, 1}), y = Tensor::empty(cuda_exec(), {t, h, p}, DType::bf16),
                 states = Tensor::zeros(cuda_exec(), {copies * t, h, p, n}, dtype_of<S>);
    SsdInputs<bf16> in{x.view<const bf16, 3>(), dt.view<const bf16, 2>(), A.view<const float, 1>(),
                       B.view<const bf16, 3>(), C.view<const bf16, 3>(),  D.view<const float, 2>()};
    time_graph(state, static_cast<int>(copies), [&](int c) {
        ssd_step(cuda_exec(), in, states.rows(c * t, (c + 1) * t).view<S, 4>(), y.view<bf16, 3>());
    });
    report_rate(state, "bytes/s", bytes, kCopyBytes);
}

void mamba_shapes(benchmark::internal::Benchmark* b) {
    for (const int64_t t : {1, 2, 8, 16, 32, 128}) b->Args({t, 1536, 48})->Args({t, 4096, 128});
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(5);
}
void mamba2_shapes(benchmark::internal::Benchmark* b) {
    for (const int64_t t : {1, 8, 128}) b->Args({t, 24})->Args({t, 64});
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(5);
}
BENCHMARK(mamba<float>)->Apply(mamba_shapes);
BENCHMARK(mamba<bf16>)->Apply(mamba_shapes);
BENCHMARK(mamba2<float>)->Apply(mamba2_shapes);
BENCHMARK(mamba2<bf16>)->Apply(mamba2_shapes);

}  // namespace
}  // namespace ssm
