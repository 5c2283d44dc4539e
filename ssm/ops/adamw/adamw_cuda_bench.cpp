// AdamW and the norm on a GPU: Mamba-130M's in_proj (768 x 3072), its embedding (50280 x 768), all its
// parameters.
#include "ssm/ops/adamw/adamw.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

template <int64_t kCount>
void step(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    const Tensor param = test::random_on_device<float>(1, {kCount}),
                 grad = test::random_on_device<float>(2, {kCount}), m = Tensor::zeros(ex, {kCount}),
                 v = Tensor::zeros(ex, {kCount});
    const AdamWOptions options;
    const auto run = [&] {
        adamw_step(ex, param.view<float, 1>(), grad.view<const float, 1>(), m.view<float, 1>(),
                   v.view<float, 1>(), options);
    };
    run();
    auto expected = test::from_device<float>(grad);
    for (float& g : expected) g *= 1.0f - options.beta1;
    test::require_right_on_device<float>(m, expected, 1e-6);
    test::time_on_device(state, kCount * 28.0, run);
}

template <int64_t kCount>
void norm(benchmark::State& state) {
    const Tensor x = test::random_on_device<float>(1, {kCount});
    double sum = 0;
    for (const float v : test::from_device<float>(x)) sum += static_cast<double>(v) * static_cast<double>(v);
    const auto run = [&] { return squared_norm(test::cuda_exec(), x.view<const float, 1>()); };
    if (std::abs(run() - sum) > 1e-9 * sum) std::exit(1);
    test::time_on_device(state, kCount * 4.0, run);
}

const bool registered = [] {
    const auto add = test::register_on_device;
    add("adamw 2.4M", step<768 * 3072>);
    add("adamw 38.6M", step<50280 * 768>);
    add("adamw 129M", step<129000000>);
    add("squared_norm 2.4M", norm<768 * 3072>);
    add("squared_norm 38.6M", norm<50280 * 768>);
    add("squared_norm 129M", norm<129000000>);
    return true;
}();

}  // namespace
}  // namespace ssm
