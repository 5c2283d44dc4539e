// The greedy choice among the 50280 entries of Mamba-130M's vocabulary, other logits in each call.
#include "ssm/ops/sample/sample.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

void greedy(benchmark::State& state) {
    const int64_t b = state.range(0), v = 50280, calls = 512 / b;
    const Tensor logits = large_random<float>({calls * b, v}),
                 ids = on_device(std::vector<int32_t>(512), {512});
    const auto step = [&](int n) {
        argmax(cuda_exec(), logits.rows(n * b, (n + 1) * b).view<const float, 2>(),
               ids.rows(n * b, (n + 1) * b).view<int32_t, 1>());
    };
    for (int n = 0; n < calls; ++n) step(n);
    const auto got = from_device<int32_t>(ids);
    const auto row = from_device<float>(logits.rows(3, 4));
    require_close(got[3], argmax(row), 0);
    time_graph(state, static_cast<int>(calls), step);
    report_rate(state, "bytes/s", static_cast<double>(b * v * 4), kCopyBytes);
}
BENCHMARK(greedy)->Arg(1)->Arg(16)->Arg(64)->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(10);

}  // namespace
}  // namespace ssm
