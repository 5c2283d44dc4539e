// The parameters of the training shape (5.2 M) and of Mamba-130M's largest layer tensors together.
#include "ssm/ops/adamw/adamw.h"

#include "ssm/ops/adamw/adamw_impl.h"
#include "tests/support/bench.h"

namespace ssm {
namespace {

struct Data {
    int64_t count;
    test::Random random{1};
    test::Buffer<float> param{random.vector(count)}, grad{random.vector(count)};
    test::Buffer<float> m{std::vector<float>(param.size())}, v{m};

    const AdamWTable table{test::bench_exec(),
                           {{{param.data(), {count}},
                             {grad.data(), {count}},
                             {m.data(), {count}},
                             {v.data(), {count}},
                             {},
                             0.1f}}};

    void step() const {
        const float rates[] = {1e-3f, 0.1f, 0.05f}, norm = 1.0f;
        adamw_step(test::bench_exec(), table, {}, {rates, {3}}, {&norm, {1}});
    }
};

void adamw(benchmark::State& state) {
    const Data data{.count = state.range(0)};
    std::vector<double> expected = test::to_double(data.param.values());
    for (size_t i = 0; i < expected.size(); ++i) {  // the first step moves by the gradient's sign
        expected[i] -= 1e-3 * (data.grad[i] > 0 ? 1.0 : -1.0) + 1e-4 * expected[i];
    }
    data.step();
    test::require_right(data.param, expected, 1e-5);
    for (auto _ : state) data.step();
    test::report_bytes(state, 32.0 * static_cast<double>(data.count));
}

void norm(benchmark::State& state) {
    test::Random random(1);
    const test::Buffer<float> x{random.vector(state.range(0))};
    double expected = 0;
    for (const float v : x.values()) expected += static_cast<double>(v) * static_cast<double>(v);
    const auto run = [&] { return cpu::squared_norm(test::bench_exec(), state.range(0), x.data()); };
    test::require_right(test::Buffer<double>{std::vector<double>{run()}}, std::vector<double>{expected},
                        1e-7);
    for (auto _ : state) benchmark::DoNotOptimize(run());
    test::report_bytes(state, 4.0 * static_cast<double>(x.size()));
}

BENCHMARK(adamw)->Arg(256)->Arg(65536)->Arg(5'200'000)->Arg(38'600'000)->UseRealTime();
BENCHMARK(norm)->Arg(256)->Arg(65536)->Arg(5'200'000)->Arg(38'600'000)->UseRealTime();

}  // namespace
}  // namespace ssm
