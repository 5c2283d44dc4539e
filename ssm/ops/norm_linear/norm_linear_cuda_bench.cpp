// The projections of a step of Mamba-130M / 1.4B and Mamba-2 130M / 1.3B, through distinct weights of 256 MB
// and more, so that they come from memory; each call may overlap with the next, as in a step.
#include "ssm/ops/norm_linear/norm_linear.h"

#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

enum Kind { plain, normed, added, gated };

void projection(benchmark::State& state, Kind kind, int64_t o, int64_t i) {
    const int64_t t = state.range(0);
    const auto bytes = static_cast<double>(o * i * 2);
    const int64_t copies = std::max<int64_t>(3, static_cast<int64_t>(256e6 / bytes));
    const Tensor weights = large_random<bf16>({copies * o, i}, 0.02f),
                 x = kind == normed ? large_random<float>({t, i}) : large_random<bf16>({t, i}),
                 z = large_random<bf16>({t, i}), norm_weight = large_random<float>({i}),
                 y = kind == added || kind == gated ? large_random<float>({t, o})
                                                    : Tensor::empty(cuda_exec(), {t, o}, DType::bf16);
    std::vector<PackedWeight> packed;
    for (int64_t n = 0; n < copies; ++n) packed.emplace_back(weights.rows(n * o, (n + 1) * o));
    NormLinearInputs in{.x = x};
    if (kind == normed || kind == gated) {
        in.norm = RmsNormOptions{};
        in.norm_weight = norm_weight.view<const float, 1>();
    }
    if (kind == gated) {
        in.norm->gate = RmsNormOptions::Gate::before;
        in.z = z;
    }
    time_graph(state, static_cast<int>(copies), [&](int n) {
        in.weight = packed[static_cast<size_t>(n)];
        norm_linear(cuda_exec(), in, y, {.add = kind == added || kind == gated});
    });
    report_rate(state, "bytes/s", bytes, kCopyBytes);
}

void tokens(benchmark::internal::Benchmark* b) {
    for (const int64_t t : {1, 2, 8, 16, 32, 128}) b->Arg(t);
    b->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(5);
}

BENCHMARK_CAPTURE(projection, mamba_130m_in_3072x768, normed, 3072, 768)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba_130m_x_80x1536, plain, 80, 1536)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba_130m_out_768x1536, added, 768, 1536)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba2_130m_in_3352x768, normed, 3352, 768)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba2_130m_out_768x1536, gated, 768, 1536)->Apply(tokens);
BENCHMARK_CAPTURE(projection, head_50288x768, normed, 50288, 768)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba_1b_in_8192x2048, normed, 8192, 2048)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba_1b_x_160x4096, plain, 160, 4096)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba_1b_out_2048x4096, added, 2048, 4096)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba2_1b_in_8512x2048, normed, 8512, 2048)->Apply(tokens);
BENCHMARK_CAPTURE(projection, mamba2_1b_out_2048x4096, gated, 2048, 4096)->Apply(tokens);
BENCHMARK_CAPTURE(projection, head_50288x2048, normed, 50288, 2048)->Apply(tokens);

}  // namespace
}  // namespace ssm
