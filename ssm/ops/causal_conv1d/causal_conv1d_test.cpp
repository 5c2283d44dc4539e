#include "ssm/ops/causal_conv1d/causal_conv1d.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "ssm/ops/causal_conv1d/causal_conv1d_reference.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using test::expect_close;
using test::expect_error;
using test::Random;

template <class T>
constexpr double kTolerance = std::is_same_v<T, float> ? 1e-6 : 5e-3;

struct Flags {
    bool bias = true, initial = true, silu = true;
};

// A problem with all its buffers; `pad` extra elements between rows make them strided and misaligned.
template <class T>
struct Problem {
    int64_t d, k, t, s, pad;
    std::vector<int64_t> cu{0};
    Flags flags;
    std::vector<T> x, initial;
    std::vector<float> weight, bias;
    test::ConvReference reference;

    Problem(int64_t d_, int64_t k_, const std::vector<int64_t>& lengths, int64_t pad_ = 0, Flags flags_ = {})
        : d(d_), k(k_), s(static_cast<int64_t>(lengths.size())), pad(pad_), flags(flags_) {
        for (int64_t length : lengths) cu.push_back(cu.back() + length);
        t = cu.back();
        Random random(5);
        x = random.vector<T>((t + 1) * (d + pad), -2.0f, 2.0f);
        weight = random.vector(d * (k + pad));
        bias = random.vector(d);
        initial = random.vector<T>(s * (k - 1) * d + 1);
        reference.d = d, reference.k = k, reference.cu_seqlens = cu, reference.silu = flags.silu;
        reference.x = test::to_double(dense(x, t, d, pad));
        reference.weight = test::to_double(dense(weight, d, k, pad));
        if (flags.bias) reference.bias = test::to_double(bias);
        if (flags.initial) {
            reference.initial_state = test::to_double(std::vector<T>(initial.begin(), initial.end() - 1));
        }
        reference.run();
    }
    // The rows without what lies between them, which must be NaN or `untouched`.
    template <class U>
    static std::vector<U> dense(const std::vector<U>& v, int64_t rows, int64_t width, int64_t pad) {
        std::vector<U> out;
        for (int64_t i = 0; i < rows; ++i) {
            const auto row = v.begin() + i * (width + pad);
            out.insert(out.end(), row, row + width);
        }
        return out;
    }
    CausalConv1dInputs<T> inputs() const {
        CausalConv1dInputs<T> in;
        in.x = {x.data(), {t, d}, d + pad};
        in.weight = {weight.data(), {d, k}, k + pad};
        if (flags.bias) in.bias = {bias.data(), {d}};
        if (flags.initial) in.initial_state = {initial.data(), {s, k - 1, d}};
        in.cu_seqlens = cu;
        in.activation = flags.silu ? Activation::silu : Activation::none;
        return in;
    }
};

template <class T>
struct Result {
    std::vector<T> y, final_state;
};

template <class T>
Result<T> run(const Problem<T>& p, int threads = 1) {
    std::vector<T> padded = test::nan_vector<T>((p.t + 1) * (p.d + p.pad));
    Result<T> r{{}, test::nan_vector<T>(p.s * (p.k - 1) * p.d + 1)};
    causal_conv1d(make_cpu_exec(threads), p.inputs(), View<T, 2>(padded.data(), {p.t, p.d}, p.d + p.pad),
                  View<T, 3>(r.final_state.data(), {p.s, p.k - 1, p.d}));
    r.final_state.pop_back();
    r.y = p.dense(padded, p.t, p.d, p.pad);
    size_t untouched = 0;
    for (const T& v : padded) untouched += std::isnan(static_cast<float>(v));
    EXPECT_EQ(untouched, padded.size() - r.y.size()) << "wrote outside of the rows, or not all of them";
    return r;
}

template <class T>
void check(const Problem<T>& p, int threads = 1) {
    SCOPED_TRACE(testing::Message() << "d " << p.d << " k " << p.k << " t " << p.t << " s " << p.s << " pad "
                                    << p.pad);
    const Result<T> r = run(p, threads);
    expect_close(r.y, p.reference.y, kTolerance<T>, "y");
    expect_close(r.final_state, p.reference.final_state, 0.0, "final_state");
}

template <class T>
class CausalConv1d : public testing::Test {};
using Activations = testing::Types<float, bf16>;
TYPED_TEST_SUITE(CausalConv1d, Activations);

TYPED_TEST(CausalConv1d, MatchesReferenceAtEveryLength) {
    for (int64_t l : {0, 1, 2, 3, 4, 5, 7, 63, 64, 65, 131}) check(Problem<TypeParam>(20, 4, {l}));
}

TYPED_TEST(CausalConv1d, MatchesReferenceAtEveryWidth) {
    for (int64_t k = 1; k <= 9; ++k) {
        for (int64_t d : {1, 3, 15, 16, 17, 40}) check(Problem<TypeParam>(d, k, {9, 6}, 3), 2);
    }
}

TYPED_TEST(CausalConv1d, MatchesReferenceWithoutOptionalArguments) {
    for (int bits = 0; bits < 8; ++bits) {
        check(Problem<TypeParam>(19, 4, {11}, 0, {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}));
    }
}

TYPED_TEST(CausalConv1d, PackedSequencesNeverSeeEachOther) {
    for (int threads : {1, 2, 3}) {
        check(Problem<TypeParam>(33, 4, {0, 5, 0, 1, 130, 2, 64, 3, 0}, 1), threads);
        check(Problem<TypeParam>(33, 7, {0, 5, 0, 1, 130, 2, 64, 3, 0}, 1, {true, false, true}), threads);
    }
}

TYPED_TEST(CausalConv1d, FinalStateMayAliasInitialState) {
    for (int64_t l = 0; l < 6; ++l) {
        Problem<TypeParam> p(18, 4, {l, 9, l});
        std::vector<TypeParam> y((p.t + 1) * p.d);
        causal_conv1d(make_cpu_exec(2), p.inputs(), View<TypeParam, 2>(y.data(), {p.t, p.d}),
                      View<TypeParam, 3>(p.initial.data(), {p.s, 3, p.d}));
        p.initial.pop_back();
        expect_close(p.initial, p.reference.final_state, 0.0, "state");
    }
}

TYPED_TEST(CausalConv1d, StepsFoldToSequence) {
    for (int64_t k : {1, 2, 4, 5}) {
        const int64_t s = 3, l = 7;
        const Problem<TypeParam> p(37, k, {l, l, l}, k == 4 ? 0 : 2);
        const auto whole = run(p);
        std::vector<TypeParam> state = p.initial;
        for (int64_t i = 0; i < l; ++i) {
            auto in = p.inputs();
            in.x = {in.x.row(i), {s, p.d}, l * in.x.stride};
            std::vector<TypeParam> y = test::nan_vector<TypeParam>(s * p.d), expected;
            causal_conv1d_step(make_cpu_exec(2), in, View<TypeParam, 3>(state.data(), {s, k - 1, p.d}),
                               View<TypeParam, 2>(y.data(), {s, p.d}));
            for (int64_t j = 0; j < s; ++j) {
                const auto row = whole.y.begin() + (j * l + i) * p.d;
                expected.insert(expected.end(), row, row + p.d);
            }
            expect_close(y, test::to_double(expected), kTolerance<TypeParam>, "y of a step");
        }
        state.pop_back();
        expect_close(state, test::to_double(whole.final_state), 0.0, "state after the steps");
    }
}

std::map<std::string, std::vector<float>> gradients(const Problem<float>& p, const std::vector<float>& grad_y,
                                                    const std::vector<float>& grad_final, int threads,
                                                    bool set_x = false) {
    std::map<std::string, std::vector<float>> v;
    auto start = [&v](const char* name, int64_t size) {
        return (v[name] = std::vector<float>(static_cast<size_t>(size) + 1, test::kGradientStart)).data();
    };
    CausalConv1dGradients<float> grad{.set_x = set_x};
    grad.x = {start("x", p.t * (p.d + p.pad)), {p.t, p.d}, p.d + p.pad};
    grad.weight = {start("weight", p.d * (p.k + p.pad)), {p.d, p.k}, p.k + p.pad};
    if (p.flags.bias) grad.bias = {start("bias", p.d), {p.d}};
    grad.initial_state = {start("initial_state", p.s * (p.k - 1) * p.d), {p.s, p.k - 1, p.d}};
    causal_conv1d_backward(make_cpu_exec(threads), p.inputs(),
                           View<const float, 2>(grad_y.data(), {p.t, p.d}),
                           View<const float, 3>(grad_final.data(), {p.s, p.k - 1, p.d}), grad);
    for (auto& [name, values] : v) {
        EXPECT_EQ(values.back(), test::kGradientStart) << "wrote outside of " << name;
        values.pop_back();
        values = test::added(values);
    }
    v["x"] = p.dense(v["x"], p.t, p.d, p.pad);
    v["weight"] = p.dense(v["weight"], p.d, p.k, p.pad);
    return v;
}

void check_gradients(const Problem<float>& p, int threads = 1) {
    SCOPED_TRACE(testing::Message() << "d " << p.d << " k " << p.k << " t " << p.t);
    Random random(7);
    const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * (p.k - 1) * p.d + 1);
    test::ConvReference r = p.reference;
    if (r.initial_state.empty()) r.initial_state.assign(static_cast<size_t>(p.s * (p.k - 1) * p.d), 0.0);
    auto loss = [&] {
        r.run();
        return std::inner_product(r.y.begin(), r.y.end(), grad_y.begin(), 0.0) +
               std::inner_product(r.final_state.begin(), r.final_state.end(), grad_final.begin(), 0.0);
    };
    const std::map<std::string, std::vector<double>*> arguments{
        {"x", &r.x}, {"weight", &r.weight}, {"bias", &r.bias}, {"initial_state", &r.initial_state}};
    for (const auto& [name, values] : gradients(p, grad_y, grad_final, threads)) {
        expect_close(values, test::finite_differences(*arguments.at(name), loss), 1e-5, name.c_str());
    }
}

TEST(CausalConv1dGradient, GradientsMatchFiniteDifferences) {
    for (int64_t k : {1, 2, 3, 4, 8}) check_gradients(Problem<float>(5, k, {0, 1, 6, 2, 0, 3}, 2), 2);
    check_gradients(Problem<float>(18, 4, {5}));
    check_gradients(Problem<float>(2, 4, {64, 65, 70, 63}), 1);
    check_gradients(Problem<float>(16, 4, {66}));  // the width known at compile time
    for (int bits = 0; bits < 8; ++bits) {
        check_gradients(
            Problem<float>(16, 4, {4, 2}, 0, {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}));
    }
}

TEST(CausalConv1dGradient, GradientsDoNotDependOnThreads) {
    const Problem<float> p(100, 4, {70, 0, 90});
    Random random(9);
    const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * 3 * p.d);
    for (int threads : {2, 3}) {
        EXPECT_EQ(gradients(p, grad_y, grad_final, 1), gradients(p, grad_y, grad_final, threads));
    }
}

// With set_x what the buffer held is lost.
TEST(CausalConv1dGradient, GradientOfXIsSetWhereAsked) {
    for (const int64_t k : {3, 4}) {
        const Problem<float> p(20, k, {0, 1, 6, 40}, 2);
        Random random(9);
        const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * (k - 1) * p.d);
        const auto added = gradients(p, grad_y, grad_final, 2);
        for (const auto& [name, values] : gradients(p, grad_y, grad_final, 2, true)) {
            std::vector<double> expected;
            for (const float x : added.at(name)) {
                expected.push_back(static_cast<double>(x - (name == "x" ? test::kGradientStart : 0.0f)));
            }
            expect_close(values, expected, 1e-6, name.c_str());
        }
    }
}

TEST(CausalConv1dErrors, NameTheArgument) {
    const Exec ex = make_cpu_exec(1);
    const Problem<float> p(4, 3, {3});
    std::vector<float> y(12), state(8);
    const View<float, 2> out(y.data(), {3, 4});
    auto in = p.inputs();
    in.weight = {p.weight.data(), {3, 4}};
    expect_error("[causal_conv1d] `weight` must be [d k] = [4, 4] but is [3, 4]",
                 [&] { causal_conv1d(ex, in, out, {}); });
    in = p.inputs(), in.bias = {p.bias.data(), {3}};
    expect_error("[causal_conv1d] `bias` must be [d] = [4] but is [3]",
                 [&] { causal_conv1d(ex, in, out, {}); });
    const std::vector<int64_t> bad{0, 2, 1, 3};
    in = p.inputs(), in.cu_seqlens = bad;
    expect_error("[causal_conv1d] `cu_seqlens` decreases at 2: 1 after 2",
                 [&] { causal_conv1d(ex, in, out, {}); });
    expect_error("[causal_conv1d] `final_state` must be [s k-1 d] = [1, 2, 4] but is [1, 3, 4]", [&] {
        causal_conv1d(ex, p.inputs(), out, View<float, 3>(state.data(), {1, 3, 4}));
    });
    in = p.inputs(), in.x = out;
    expect_error("[causal_conv1d] `y` must not alias `x`", [&] { causal_conv1d(ex, in, out, {}); });
    expect_error("[causal_conv1d] `state` must be [s k-1 d] = [3, 2, 4] but is [1, 2, 4]", [&] {
        causal_conv1d_step(ex, p.inputs(), View<float, 3>(state.data(), {1, 2, 4}), out);
    });
    in = p.inputs(), in.bias = {};
    CausalConv1dGradients<float> grad;
    grad.bias = {state.data(), {4}};
    expect_error("[causal_conv1d] `grad.bias` is given but `bias` is absent", [&] {
        causal_conv1d_backward(ex, in, View<const float, 2>(y.data(), {3, 4}), {}, grad);
    });
    const Problem<bf16> rounded(4, 3, {3});
    const std::vector<bf16> grad_y(12);
    const auto backward = [&] {
        causal_conv1d_backward<bf16>(ex, rounded.inputs(), {grad_y.data(), {3, 4}}, {}, {});
    };
    expect_error("[causal_conv1d] gradients of bf16 activations need a GPU", backward,
                 ErrorCode::unsupported);
}

}  // namespace
}  // namespace ssm
