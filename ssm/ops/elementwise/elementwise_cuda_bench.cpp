// The elementwise functions on a GPU at t = 16384 (batch 8 x 2048), d 1536.
#include "ssm/ops/elementwise/elementwise.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

constexpr int64_t kT = 16384, kD = 1536;
constexpr double kSize = double{kT} * kD;

struct Arguments {
    Tensor a = test::random_on_device<float>(1, {kT, kD}), b = test::random_on_device<float>(2, {kT, kD}),
           y = Tensor::zeros(test::cuda_exec(), {kT, kD}),
           low = Tensor::zeros(test::cuda_exec(), {kT, kD}, DType::bf16);
    View<const float, 2> in_a() const { return a.view<const float, 2>(); }
    View<const float, 2> in_b() const { return b.view<const float, 2>(); }
    View<float, 2> out() const { return y.view<float, 2>(); }
};

template <double (*kFunction)(double)>
void require(const Arguments& arguments) {
    auto expected = test::to_double(test::from_device<float>(arguments.a));
    for (double& v : expected) v = kFunction(v);
    test::require_right_on_device<float>(arguments.y, expected, 1e-6);
}
double silu_of(double x) { return x / (1 + std::exp(-x)); }
double softplus_of(double x) { return std::log1p(std::exp(x)); }

void silu_forward(benchmark::State& state) {
    const Arguments v;
    const auto run = [&] { silu(test::cuda_exec(), v.in_a(), v.out()); };
    run();
    require<silu_of>(v);
    test::time_on_device(state, kSize * 8, run);
}
void softplus_forward(benchmark::State& state) {
    const Arguments v;
    const auto run = [&] { softplus(test::cuda_exec(), v.in_a(), v.out()); };
    run();
    require<softplus_of>(v);
    test::time_on_device(state, kSize * 8, run);
}
void silu_gradient(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 16,
                         [&] { silu_backward(test::cuda_exec(), v.in_a(), v.in_b(), v.out()); });
}
void add_two(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 12, [&] { add(test::cuda_exec(), v.in_a(), v.in_b(), v.out()); });
}
void accumulate_one(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 12, [&] { accumulate(test::cuda_exec(), v.in_a(), v.out(), 0.5f); });
}
void accumulate_low(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 8, [&] {
        accumulate<float, bf16>(test::cuda_exec(), v.in_a(), v.low.view<bf16, 2>(), 0.5f);
    });
}
void cast_down(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 6,
                         [&] { cast<float, bf16>(test::cuda_exec(), v.in_a(), v.low.view<bf16, 2>()); });
}
void cast_up(benchmark::State& state) {
    const Arguments v;
    test::time_on_device(state, kSize * 6,
                         [&] { cast<bf16, float>(test::cuda_exec(), v.low.view<const bf16, 2>(), v.out()); });
}
void silu_strided(benchmark::State& state) {
    const Arguments v;
    const auto x = v.a.columns(0, kD / 2).view<const float, 2>();
    const auto y = v.y.columns(kD / 2, kD).view<float, 2>();
    test::time_on_device(state, kSize * 4, [&] { silu(test::cuda_exec(), x, y); });
}

const bool registered = [] {
    const auto add_bench = test::register_on_device;
    add_bench("silu", silu_forward);
    add_bench("silu of half the columns", silu_strided);
    add_bench("softplus", softplus_forward);
    add_bench("silu_backward", silu_gradient);
    add_bench("add", add_two);
    add_bench("accumulate", accumulate_one);
    add_bench("accumulate f32 to bf16", accumulate_low);
    add_bench("cast f32 to bf16", cast_down);
    add_bench("cast bf16 to f32", cast_up);
    return true;
}();

}  // namespace
}  // namespace ssm
