// The CUDA kernels against the f64 definition, their gradients and steps against the CPU's kernels (which
// causal_conv1d_test.cpp holds against finite differences): filters short and long, sequences of all lengths,
// empty ones too, strided and misaligned rows, states in place.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/causal_conv1d/causal_conv1d.h"
#include "ssm/ops/causal_conv1d/causal_conv1d_reference.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

struct Case {
    std::vector<int64_t> lengths;
    int64_t d, k;
    bool bias = true, states = true, silu = true;
    int64_t offset = 0, apart = 0;  // columns before a row and after it, in a wider tensor

    std::vector<int64_t> cu_seqlens() const {
        std::vector<int64_t> sums{0};
        for (const int64_t length : lengths) sums.push_back(sums.back() + length);
        return sums;
    }
    int64_t t() const { return cu_seqlens().back(); }
    int64_t s() const { return static_cast<int64_t>(lengths.size()); }
    int64_t width() const { return offset + d + apart; }
};

std::vector<Case> cases() {
    std::vector<Case> all{{{0}, 8, 4},
                          {{1}, 1, 4},
                          {{2}, 5, 1},
                          {{3}, 8, 3},
                          {{4, 0, 1, 2, 3, 5, 16, 17, 15, 33}, 24, 4},
                          {{4, 0, 1, 2, 3, 5, 16, 17, 15, 33}, 13, 4},
                          {{300, 1, 700}, 136, 4, false, false},
                          {{128, 129, 127}, 64, 4, true, true, false},
                          {{4, 0, 1, 2, 3, 5, 16, 17, 15, 33}, 16, 2},
                          {{4, 0, 1, 2, 3, 5, 16, 300}, 12, 6},
                          {{7, 9}, 24, 4, true, true, true, 1, 2},
                          {{70, 9}, 24, 4, true, true, true, 8, 16},
                          {{2300}, 512, 4, true, true, true, 512, 0},
                          {std::vector<int64_t>(70, 5), 40, 4},
                          {{8192, 8192}, 512, 4}};
    return all;
}

// Arguments on both devices; the activations strided.
template <class T>
struct Arguments {
    const Case& c;
    std::vector<int64_t> cu_seqlens;
    std::vector<T> x, state;
    std::vector<float> weight, bias;
    Tensor x_there, weight_there, bias_there, state_there;

    explicit Arguments(const Case& of)
        : c(of),
          cu_seqlens(of.cu_seqlens()),
          x(test::Random(1).vector<T>(of.t() * of.width(), -2.0f, 2.0f)),
          state(test::Random(2).vector<T>(of.s() * (of.k - 1) * of.d)),
          weight(test::Random(3).vector(of.d * of.k)),
          bias(test::Random(4).vector(of.d)),
          x_there(test::on_device(x, {of.t(), of.width()})),
          weight_there(test::on_device(weight, {of.d, of.k})),
          bias_there(test::on_device(bias, {of.d})),
          state_there(test::on_device(state, {of.s(), of.k - 1, of.d})) {
        x.reserve(1);
    }
    CausalConv1dInputs<T> here() const {
        CausalConv1dInputs<T> in{
            {x.data() + c.offset, {c.t(), c.d}, c.width()}, {weight.data(), {c.d, c.k}}, {}, cu_seqlens, {},
            c.silu ? Activation::silu : Activation::none};
        if (c.bias) in.bias = {bias.data(), {c.d}};
        if (c.states && c.k > 1) in.initial_state = {state.data(), {c.s(), c.k - 1, c.d}};
        return in;
    }
    CausalConv1dInputs<T> there() const {
        CausalConv1dInputs<T> in = here();
        in.x = x_there.columns(c.offset, c.offset + c.d).template view<const T, 2>();
        in.weight = weight_there.view<const float, 2>();
        if (in.bias) in.bias = bias_there.view<const float, 1>();
        if (in.initial_state) in.initial_state = state_there.view<const T, 3>();
        return in;
    }
    // Inside of a tensor [t width].
    template <class U>
    View<U, 2> rows(const Tensor& tensor) const {
        return tensor.columns(c.offset, c.offset + c.d).template view<U, 2>();
    }
};

template <class T>
void check_forward(const Case& c) {
    const Arguments<T> a(c);
    test::ConvReference reference{c.d, c.k, a.cu_seqlens, {}, test::to_double(a.weight),
                                  {},  {},  c.silu,       {}, {}};
    for (int64_t i = 0; i < c.t() * c.d; ++i)
        reference.x.push_back(static_cast<double>(
            static_cast<float>(a.x[static_cast<size_t>(i / c.d * c.width() + c.offset + i % c.d)])));
    if (c.bias) reference.bias = test::to_double(a.bias);
    if (c.states) reference.initial_state = test::to_double(a.state);
    reference.run();
    std::vector<double> expected(static_cast<size_t>(c.t() * c.width()), NAN);
    for (int64_t i = 0; i < c.t() * c.d; ++i)
        expected[static_cast<size_t>(i / c.d * c.width() + c.offset + i % c.d)] =
            reference.y[static_cast<size_t>(i)];
    const Tensor y = test::on_device(test::nan_vector<T>(c.t() * c.width()), {c.t(), c.width()});
    const CausalConv1dInputs<T> in = a.there();
    // Where there is one, the final state is written over the initial one.
    const Tensor state =
        c.states ? a.state_there
                 : test::on_device(test::nan_vector<T>(c.s() * (c.k - 1) * c.d), {c.s(), c.k - 1, c.d});
    causal_conv1d<T>(test::cuda_exec(), in, a.template rows<T>(y), state.view<T, 3>());
    test::expect_close(test::from_device<T>(y), expected, sizeof(T) == 2 ? 4e-3 : 1e-6, "y");
    test::expect_close(test::from_device<T>(state), reference.final_state, 0, "final_state");
}

// The CPU has gradients of f32 alone: it gets what bf16 says, in f32.
template <class T>
void check_backward(const Case& c, bool set_x) {
    const Arguments<T> a(c);
    const auto filled = []<class U>(int64_t n, U v) {
        std::vector<U> r(static_cast<size_t>(n), v);
        r.reserve(1);
        return r;
    };
    const Exec& ex = test::cuda_exec();
    constexpr float kStart = test::kGradientStart;
    const int64_t rows = c.t() * c.width(), taps = c.s() * (c.k - 1) * c.d;
    const auto grad_y = test::Random(5).vector<T>(rows + 1);
    const auto grad_state = test::Random(6).vector(taps);
    const auto widened = [](const std::vector<T>& v) {
        std::vector<float> r(v.begin(), v.end());
        r.reserve(1);
        return r;
    };
    const auto wide_x = widened(a.x), wide_state = widened(a.state), wide_grad_y = widened(grad_y);
    auto x = filled(rows, kStart), weight = filled(c.d * c.k, kStart), bias = filled(c.d, kStart),
         state = filled(taps, kStart);
    const Tensor x_there = test::on_device(filled(rows, static_cast<T>(kStart)), {c.t(), c.width()}),
                 weight_there = test::on_device(weight, {c.d, c.k}),
                 bias_there = test::on_device(bias, {c.d}),
                 state_there = test::on_device(state, {c.s(), c.k - 1, c.d}),
                 grad_state_there = test::on_device(grad_state, {c.s(), c.k - 1, c.d}),
                 grad_y_there =
                     test::on_device(std::vector<T>(grad_y.begin(), grad_y.end() - 1), {c.t(), c.width()});
    CausalConv1dGradients<float> here{
        {x.data() + c.offset, {c.t(), c.d}, c.width()}, {weight.data(), {c.d, c.k}}, {}, {}, set_x};
    CausalConv1dGradients<T> there{a.template rows<T>(x_there), weight_there.view<float, 2>(), {}, {}, set_x};
    View<const float, 3> final_here, final_there;
    const CausalConv1dInputs<T> in = a.here();
    CausalConv1dInputs<float> wide{{wide_x.data() + c.offset, in.x.shape, in.x.stride},
                                   in.weight,
                                   in.bias,
                                   in.cu_seqlens,
                                   {},
                                   in.activation};
    if (in.initial_state) wide.initial_state = {wide_state.data(), in.initial_state.shape};
    if (c.bias) here.bias = {bias.data(), {c.d}}, there.bias = bias_there.view<float, 1>();
    if (c.states && c.k > 1) {
        here.initial_state = {state.data(), {c.s(), c.k - 1, c.d}},
        there.initial_state = state_there.view<float, 3>();
        final_here = {grad_state.data(), {c.s(), c.k - 1, c.d}},
        final_there = grad_state_there.view<const float, 3>();
    }
    causal_conv1d_backward<float>(make_cpu_exec(2), wide,
                                  {wide_grad_y.data() + c.offset, {c.t(), c.d}, c.width()}, final_here, here);
    causal_conv1d_backward<T>(ex, a.there(), a.template rows<const T>(grad_y_there), final_there, there);
    test::expect_close(test::from_device<T>(x_there), test::to_double(x), sizeof(T) == 2 ? 4e-3 : 2e-6,
                       "grad x");
    test::expect_close(test::from_device<float>(weight_there), weight, 1e-5, "grad weight");
    test::expect_close(test::from_device<float>(bias_there), bias, 1e-5, "grad bias");
    test::expect_close(test::from_device<float>(state_there), state, 2e-6, "grad initial_state");
}

template <class F>
void for_all(F f) {
    for (const Case& c : cases()) {
        SCOPED_TRACE(testing::Message() << "s " << c.s() << " t " << c.t() << " d " << c.d << " k " << c.k
                                        << " offset " << c.offset);
        f(c);
    }
}

TEST(CausalConv1dCuda, MatchesReference) {
    for_all([](const Case& c) {
        check_forward<float>(c);
        check_forward<bf16>(c);
    });
}

TEST(CausalConv1dCuda, GradientsMatchCpu) {
    for_all([](const Case& c) {
        check_backward<float>(c, false);
        check_backward<float>(c, true);
        check_backward<bf16>(c, false);
        check_backward<bf16>(c, true);
    });
}

TEST(CausalConv1dCuda, GradientsAreReproducible) {
    const Case c{{3000, 1000}, 96, 4};
    const Arguments<float> a(c);
    const Exec& ex = test::cuda_exec();
    const Tensor grad_y = test::on_device(test::Random(5).vector(c.t() * c.d), {c.t(), c.d});
    std::vector<float> first;
    for (int i = 0; i < 4; ++i) {
        const Tensor weight = Tensor::zeros(ex, {c.d, c.k});
        causal_conv1d_backward<float>(ex, a.there(), grad_y.view<const float, 2>(), {},
                                      {{}, weight.view<float, 2>(), {}, {}, false});
        const auto now = test::from_device<float>(weight);
        if (i == 0) first = now;
        EXPECT_EQ(now, first);
    }
}

// Five tokens of s sequences, by both devices; with slots their states lie in a pool, the last first.
template <class T>
void check_steps(int64_t s, int64_t d, int64_t k, int64_t apart, bool with_slots = false) {
    SCOPED_TRACE(testing::Message() << "s " << s << " d " << d << " k " << k << " apart " << apart
                                    << " slots " << with_slots);
    const auto weight = test::Random(3).vector(d * k), bias = test::Random(4).vector(d);
    const int64_t width = d + apart, pool = with_slots ? s + 3 : s;
    auto state = test::Random(2).vector<T>(pool * (k - 1) * d);
    std::vector<int32_t> slots;
    for (int64_t i = 0; with_slots && i < s; ++i) slots.push_back(static_cast<int32_t>(pool - 1 - i));
    const Tensor slots_there = with_slots ? test::on_device(slots, {s}) : Tensor();
    const Tensor weight_there = test::on_device(weight, {d, k}), bias_there = test::on_device(bias, {d}),
                 state_there = test::on_device(state, {pool, k - 1, d});
    for (uint64_t step = 0; step < 5; ++step) {
        const auto x = test::Random(10 + step).vector<T>(s * width);
        auto y = test::nan_vector<T>(s * width);
        const Tensor x_there = test::on_device(x, {s, width}), y_there = test::on_device(y, {s, width});
        View<T, 3> state_here(state.data(), {pool, k - 1, d});
        causal_conv1d_step<T>(make_cpu_exec(1),
                              {{x.data() + apart, {s, d}, width},
                               {weight.data(), {d, k}},
                               {bias.data(), {d}},
                               {},
                               {},
                               Activation::silu,
                               with_slots ? Slots(slots.data(), {s}) : Slots()},
                              state_here, {y.data() + apart, {s, d}, width});
        causal_conv1d_step<T>(test::cuda_exec(),
                              {x_there.columns(apart, width).view<const T, 2>(),
                               weight_there.view<const float, 2>(),
                               bias_there.view<const float, 1>(),
                               {},
                               {},
                               Activation::silu,
                               slots_there.view_if<const int32_t, 1>()},
                              state_there.view<T, 3>(), y_there.columns(apart, width).view<T, 2>());
        test::expect_close(test::from_device<T>(y_there), test::to_double(y), sizeof(T) == 2 ? 4e-3 : 1e-6,
                           "y");
    }
    test::expect_close(test::from_device<T>(state_there), test::to_double(state), 0, "state");
}

TEST(CausalConv1dCuda, StepsMatchCpu) {
    for (const int64_t k : {1, 2, 4, 6}) {
        for (const int64_t apart : {0, 1}) {
            for (const int64_t s : {1, 3, 200}) {
                check_steps<float>(s, 24, k, apart);
                check_steps<bf16>(s, 24, k, apart);
            }
            check_steps<float>(100, 1536, k, apart);
            check_steps<bf16>(103, 1536, k, apart);
        }
    }
}

TEST(CausalConv1dCuda, StepsOfManySequencesMatchCpu) {
    for (const int64_t s : {1, 7, 33, 128, 131})
        for (const int64_t d : {1536, 4096})
            for (const bool with_slots : {false, true}) {
                check_steps<float>(s, d, 4, 0, with_slots);
                check_steps<bf16>(s, d, 4, 2, with_slots);
            }
}

}  // namespace
}  // namespace ssm
