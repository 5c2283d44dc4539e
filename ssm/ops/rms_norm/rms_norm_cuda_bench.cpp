// rms_norm on a GPU at t = 16384 (batch 8 x 2048), d of Mamba-130M's residual (768) and inner (1536) width,
// and one decoded token.
#include "ssm/ops/rms_norm/rms_norm.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using Gate = RmsNormOptions::Gate;
constexpr int64_t kTokens = 16384;

template <class X, class Y, int64_t kT, int64_t kD, Gate kGate>
void forward(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    RmsNormOptions options;
    options.gate = kGate;
    const auto x = test::Random(1).vector<X>(kT * kD);
    const auto z = test::Random(3).vector<Y>(kT * kD);
    const auto weight = test::Random(2).vector(kD);
    std::vector<Y> expected(x.size());
    const bool gated = kGate != Gate::none;
    rms_norm<X, Y>(make_cpu_exec(),
                   {{x.data(), {kT, kD}}, {weight.data(), {kD}}, {gated ? z.data() : nullptr, {kT, kD}}},
                   {expected.data(), {kT, kD}}, {}, options);
    const Tensor x_there = test::on_device(x, {kT, kD}), weight_there = test::on_device(weight, {kD}),
                 z_there = test::on_device(z, {kT, kD}), y = Tensor::empty(ex, {kT, kD}, dtype_of<Y>);
    RmsNormInputs<X, Y> in{x_there.view<const X, 2>(), weight_there.view<const float, 1>(), {}};
    if (gated) in.z = z_there.view<const Y, 2>();
    const auto run = [&] { rms_norm<X, Y>(ex, in, y.view<Y, 2>(), {}, options); };
    run();
    test::require_right_on_device<Y>(y, test::to_double(expected), 4e-3);
    test::time_on_device(state, double{kT} * kD * (sizeof(X) + (gated ? 2 : 1) * sizeof(Y)), run);
}

template <class X, class Y, int64_t kT, int64_t kD>
void add_forward(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    const Tensor x = test::random_on_device<X>(1, {kT, kD}), weight = test::random_on_device<float>(2, {kD}),
                 residual = test::random_on_device<float>(3, {kT, kD}), rstd = Tensor::empty(ex, {kT, 1}),
                 out = Tensor::empty(ex, {kT, kD}), y = Tensor::empty(ex, {kT, kD}, dtype_of<Y>);
    const auto run = [&] {
        add_rms_norm<X, Y>(ex, residual.view<const float, 2>(), x.view<const X, 2>(),
                           weight.view<const float, 1>(), out.view<float, 2>(), y.view<Y, 2>(),
                           rstd.view<float, 2>());
    };
    run();
    auto x_host = test::from_device<X>(x);
    auto sum = test::from_device<float>(residual);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<float>(x_host[i]);
    test::require_right_on_device<float>(out, sum, 0);
    test::time_on_device(state, double{kT} * kD * (sizeof(X) + sizeof(Y) + 8), run);
}

// What training in bf16 has: the residual's gradient, f32, is added to and its copy in Y written (kBranch);
// gradients of the rest are written (kSet).
template <class X, class Y, int64_t kD, Gate kGate, bool kSet, bool kBranch>
void backward(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    constexpr int64_t kT = kTokens;
    constexpr bool kGated = kGate != Gate::none;
    RmsNormOptions options;
    options.gate = kGate;
    const Tensor x = test::random_on_device<X>(1, {kT, kD}), weight = test::random_on_device<float>(2, {kD}),
                 z = test::random_on_device<Y>(4, {kT, kD}), grad_y = test::random_on_device<Y>(3, {kT, kD}),
                 rstd = Tensor::empty(ex, {kT, 1}), y = Tensor::empty(ex, {kT, kD}, dtype_of<Y>),
                 grad_x = Tensor::zeros(ex, {kT, kD}, dtype_of<X>),
                 grad_z = Tensor::zeros(ex, {kT, kD}, dtype_of<Y>),
                 branch = Tensor::zeros(ex, {kT, kD}, dtype_of<Y>), grad_weight = Tensor::zeros(ex, {kD});
    RmsNormInputs<X, Y> in{x.view<const X, 2>(), weight.view<const float, 1>(), {}};
    RmsNormGradients<X, Y> grad{grad_x.view<X, 2>(), grad_weight.view<float, 1>(), {}, {}, kSet, kSet};
    if (kGated) in.z = z.view<const Y, 2>(), grad.z = grad_z.view<Y, 2>();
    if (kBranch) grad.branch = branch.view<Y, 2>();
    rms_norm<X, Y>(ex, in, y.view<Y, 2>(), rstd.view<float, 2>(), options);
    const auto run = [&] {
        rms_norm_backward<X, Y>(ex, in, rstd.view<const float, 2>(), grad_y.view<const Y, 2>(), grad,
                                options);
    };
    // Checked by its test; here the weight's gradient of the whole shape, when the gate is simple.
    run();
    if (kGate != Gate::before) {
        const auto g = test::from_device<Y>(grad_y), gate = test::from_device<Y>(z);
        const auto s = test::from_device<float>(rstd);
        const auto v = test::from_device<X>(x);
        std::vector<double> expected(kD, 0.0);
        for (size_t i = 0; i < g.size(); ++i) {
            const double open = static_cast<double>(static_cast<float>(gate[i]));
            expected[i % kD] += static_cast<double>(static_cast<float>(g[i])) *
                                static_cast<double>(static_cast<float>(v[i])) *
                                static_cast<double>(s[i / kD]) *
                                (kGated ? open / (1 + std::exp(-open)) : 1.0);
        }
        test::require_right_on_device<float>(grad_weight, expected, 1e-4);
    }
    const double each = sizeof(X) * (kSet ? 2 : 3) + sizeof(Y) * (kBranch ? 2 : 1) +
                        (kGated ? sizeof(Y) * (kSet ? 2 : 3) : 0);
    test::time_on_device(state, double{kT} * kD * each, run);
}

const bool registered = [] {
    const auto add = test::register_on_device;
    add("forward f32 16384x768", forward<float, float, kTokens, 768, Gate::none>);
    add("forward f32 16384x1536", forward<float, float, kTokens, 1536, Gate::none>);
    add("forward bf16 16384x768", forward<bf16, bf16, kTokens, 768, Gate::none>);
    add("forward bf16 16384x1536", forward<bf16, bf16, kTokens, 1536, Gate::none>);
    add("forward bf16 4096x4096", forward<bf16, bf16, 4096, 4096, Gate::none>);
    add("forward f32 to bf16 16384x768", forward<float, bf16, kTokens, 768, Gate::none>);
    add("forward gate before bf16 16384x1536", forward<bf16, bf16, kTokens, 1536, Gate::before>);
    add("forward gate after bf16 16384x1536", forward<bf16, bf16, kTokens, 1536, Gate::after>);
    add("forward bf16 1x768", forward<bf16, bf16, 1, 768, Gate::none>);
    add("forward f32 1x1536", forward<float, float, 1, 1536, Gate::none>);
    add("add f32 16384x768", add_forward<float, float, kTokens, 768>);
    add("add f32 16384x1536", add_forward<float, float, kTokens, 1536>);
    add("add bf16 16384x768", add_forward<bf16, bf16, kTokens, 768>);
    add("add bf16 16384x1536", add_forward<bf16, bf16, kTokens, 1536>);
    add("add bf16 1x768", add_forward<bf16, bf16, 1, 768>);
    add("backward f32 16384x768", backward<float, float, 768, Gate::none, false, false>);
    add("backward f32 16384x1536", backward<float, float, 1536, Gate::none, false, false>);
    add("backward f32 to bf16 16384x768", backward<float, bf16, 768, Gate::none, false, false>);
    add("backward f32 to bf16, branch 16384x768", backward<float, bf16, 768, Gate::none, false, true>);
    add("backward f32 to bf16, set, branch 16384x768", backward<float, bf16, 768, Gate::none, true, true>);
    add("backward bf16 16384x768", backward<bf16, bf16, 768, Gate::none, false, false>);
    add("backward gate before bf16 16384x1536", backward<bf16, bf16, 1536, Gate::before, true, false>);
    add("backward gate after bf16 16384x1536", backward<bf16, bf16, 1536, Gate::after, true, false>);
    return true;
}();

}  // namespace
}  // namespace ssm
