// The causal convolution on a GPU at batch 8 x 2048, k 4, bias and SiLU, and a decoding step.
#include "ssm/ops/causal_conv1d/causal_conv1d.h"
#include "ssm/ops/causal_conv1d/causal_conv1d_reference.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

constexpr int64_t kTokens = 16384, kLength = 2048, kTaps = 4;

template <class T>
struct Arguments {
    std::vector<int64_t> cu_seqlens;
    Tensor x, weight, bias;
    Arguments(int64_t t, int64_t d)
        : x(test::random_on_device<T>(1, {t, d})),
          weight(test::random_on_device<float>(2, {d, kTaps})),
          bias(test::random_on_device<float>(3, {d})) {
        for (int64_t i = 0; i <= t; i += kLength) cu_seqlens.push_back(i);
    }
    CausalConv1dInputs<T> inputs() const {
        return {
            x.view<const T, 2>(), weight.view<const float, 2>(), bias.view<const float, 1>(), cu_seqlens, {},
            Activation::silu};
    }
};

template <class T, int64_t kD>
void forward(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    const Arguments<T> a(kTokens, kD);
    const Tensor y = Tensor::empty(ex, {kTokens, kD}, dtype_of<T>);
    const auto in = a.inputs();
    const auto run = [&] { causal_conv1d<T>(ex, in, y.view<T, 2>(), {}); };
    run();
    test::ConvReference reference{kD,
                                  kTaps,
                                  a.cu_seqlens,
                                  test::to_double(test::from_device<T>(a.x)),
                                  test::to_double(test::from_device<float>(a.weight)),
                                  test::to_double(test::from_device<float>(a.bias)),
                                  {},
                                  true,
                                  {},
                                  {}};
    reference.run();
    test::require_right_on_device<T>(y, reference.y, sizeof(T) == 2 ? 4e-3 : 1e-6);
    test::time_on_device(state, double{kTokens} * kD * 2 * sizeof(T), run);
}

template <class T, int64_t kD, bool kSet>
void backward(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    const Arguments<T> a(kTokens, kD);
    const Tensor grad_y = test::random_on_device<T>(4, {kTokens, kD}),
                 x = Tensor::zeros(ex, {kTokens, kD}, dtype_of<T>), weight = Tensor::zeros(ex, {kD, kTaps}),
                 bias = Tensor::zeros(ex, {kD});
    const auto in = a.inputs();
    const auto run = [&] {
        causal_conv1d_backward<T>(ex, in, grad_y.view<const T, 2>(), {},
                                  {x.view<T, 2>(), weight.view<float, 2>(), bias.view<float, 1>(), {}, kSet});
    };
    run();
    const auto wide = [](const std::vector<T>& v) { return std::vector<float>(v.begin(), v.end()); };
    const auto x_host = wide(test::from_device<T>(a.x)), grad_host = wide(test::from_device<T>(grad_y));
    const auto weight_host = test::from_device<float>(a.weight), bias_host = test::from_device<float>(a.bias);
    std::vector<float> expected(x_host.size(), 0.0f);
    const CausalConv1dInputs<float> here{{x_host.data(), {kTokens, kD}},
                                         {weight_host.data(), {kD, kTaps}},
                                         {bias_host.data(), {kD}},
                                         a.cu_seqlens,
                                         {},
                                         Activation::silu};
    causal_conv1d_backward<float>(make_cpu_exec(), here, {grad_host.data(), {kTokens, kD}}, {},
                                  {{expected.data(), {kTokens, kD}}, {}, {}, {}, true});
    test::require_right_on_device<T>(x, expected, sizeof(T) == 2 ? 4e-3 : 1e-5);
    test::time_on_device(state, double{kTokens} * kD * (kSet ? 3 : 4) * sizeof(T), run);
}

template <class T, int64_t kS, int64_t kD>
void step(benchmark::State& state) {
    const Exec& ex = test::cuda_exec();
    const Arguments<T> a(kS, kD);
    const Tensor y = Tensor::empty(ex, {kS, kD}, dtype_of<T>),
                 memory = Tensor::zeros(ex, {kS, kTaps - 1, kD}, dtype_of<T>);
    const auto in = a.inputs();
    test::time_on_device(state, double{kS} * kD * (2 + 2 * (kTaps - 1)) * sizeof(T),
                         [&] { causal_conv1d_step<T>(ex, in, memory.view<T, 3>(), y.view<T, 2>()); });
}

const bool registered = [] {
    const auto add = test::register_on_device;
    add("forward bf16 d 1536", forward<bf16, 1536>);
    add("forward bf16 d 768", forward<bf16, 768>);
    add("forward f32 d 1536", forward<float, 1536>);
    add("forward f32 d 768", forward<float, 768>);
    add("backward bf16 d 1536 set", backward<bf16, 1536, true>);
    add("backward bf16 d 1536 add", backward<bf16, 1536, false>);
    add("backward bf16 d 768 set", backward<bf16, 768, true>);
    add("backward f32 d 1536 set", backward<float, 1536, true>);
    add("backward f32 d 768 set", backward<float, 768, true>);
    add("step bf16 1 x 1536", step<bf16, 1, 1536>);
    add("step bf16 128 x 1536", step<bf16, 128, 1536>);
    return true;
}();

}  // namespace
}  // namespace ssm
