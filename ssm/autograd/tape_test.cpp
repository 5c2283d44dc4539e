// The tape: order, slices, shared and re-used gradients; and every differentiable function of the table
// against central differences of itself in f64.
#include "ssm/autograd/tape.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ssm/autograd/derivatives.h"
#include "tests/support/gradcheck.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

std::vector<float> values(const Tensor& t) {
    const Tensor dense = t.dense() ? t : t.clone();
    return {dense.data<const float>(), dense.data<const float>() + dense.size()};
}

Var variable(const Shape& shape, uint64_t seed, float low = -1, float high = 1) {
    return Var(Tensor::from_floats(shape, Random(seed).vector(element_count(shape), low, high)), true);
}

// The seed of the backward pass: the gradient of the result is `g`.
void backward_from(const Exec& ex, Tape& tape, const Var& y, const std::vector<float>& g) {
    y.add_grad(ex, Tensor::from_floats(y.value().shape(), g));
    tape.backward();
}

TEST(Tape, RunsBackwardsOnceAndReleases) {
    std::vector<int> order;
    auto token = std::make_shared<int>(0);
    Tape tape;
    for (int i = 0; i < 3; ++i) tape.record([&order, i, token] { order.push_back(i); });
    EXPECT_EQ(tape.size(), 3u);
    EXPECT_EQ(token.use_count(), 4);
    tape.backward();
    EXPECT_EQ(order, (std::vector<int>{2, 1, 0}));
    EXPECT_EQ(tape.size(), 0u);
    EXPECT_EQ(token.use_count(), 1);  // what a closure held is gone
    tape.backward();
    EXPECT_EQ(order.size(), 3u);
}

TEST(Var, ColumnsAreAWindowOnValueAndGradient) {
    const Exec ex = make_cpu_exec(1);
    const Var x(Tensor::from_floats({2, 5}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}), true);
    const Var slice = x.columns(1, 4), inner = slice.columns(1, 3);  // columns 2 and 3 of x
    EXPECT_TRUE(slice.requires_grad());
    EXPECT_EQ(values(inner.value()), (std::vector<float>{2, 3, 7, 8}));
    EXPECT_FALSE(inner.has_grad());
    inner.add_grad(ex, Tensor::from_floats({2, 2}, {1, 2, 3, 4}));
    slice.add_grad(ex, Tensor::from_floats({2, 3}, {10, 10, 10, 20, 20, 20}));
    EXPECT_TRUE(x.has_grad() && slice.has_grad());
    EXPECT_EQ(values(x.grad(ex)), (std::vector<float>{0, 10, 11, 12, 0, 0, 20, 23, 24, 0}));
}

TEST(Var, FirstGradientIsACopy) {
    const Exec ex = make_cpu_exec(1);
    const Var x = variable({1, 3}, 1);
    const Tensor g = Tensor::from_floats({1, 3}, {1, 2, 3});
    x.add_grad(ex, g);
    x.add_grad(ex, g);
    EXPECT_EQ(values(x.grad(ex)), (std::vector<float>{2, 4, 6}));
    EXPECT_EQ(values(g), (std::vector<float>{1, 2, 3}));
    x.clear_grad();
    EXPECT_FALSE(x.has_grad());
}

// Blocks that the allocator hands out next hold NaN.
void poison(const Exec& ex) {
    std::vector<Tensor> all;
    for (int64_t size = 16; size <= 1024; size += 16) {
        for (int i = 0; i < 8; ++i) {
            all.push_back(Tensor::empty(ex, {size}));
            std::fill_n(all.back().data<float>(), size, NAN);
        }
    }
}

TEST(Var, FreshTargetsAreSetOnceAndTheRestIsZero) {
    const Exec ex = make_cpu_exec(1);
    poison(ex);
    const Var x = variable({2, 6}, 1), left = x.columns(0, 2), right = x.columns(4, 6);
    for (const Var& slice : {right, left}) {
        const Var::GradTarget target = slice.grad_target(ex);
        EXPECT_TRUE(target.fresh);
        for (int64_t i = 0; i < 2; ++i) std::fill_n(target.tensor.view<float, 2>().row(i), 2, 1.0f);
        EXPECT_FALSE(slice.grad_target(ex).fresh);
    }
    const Var::GradTarget overlap = x.columns(1, 3).grad_target(ex);  // one column set, one not
    EXPECT_FALSE(overlap.fresh);
    EXPECT_EQ((overlap.tensor.view<float, 2>()(0, 1)), 0.0f);
    EXPECT_EQ(values(x.grad(ex)), (std::vector<float>{1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1}));
    x.clear_grad();
    EXPECT_TRUE(x.grad_target(ex).fresh);
    EXPECT_FALSE(left.grad_target(ex).fresh);
}

TEST(Var, AnUnsetGradientIsSetInItsPlace) {
    const Exec ex = make_cpu_exec(1);
    const Var x(Tensor::zeros({2, 3}), true);
    const Tensor buffer = x.grad(ex);
    std::fill_n(buffer.data<float>(), 6, 7.0f);
    x.unset_grad(ex);
    const Var::GradTarget target = x.grad_target(ex);
    EXPECT_TRUE(target.fresh);
    EXPECT_EQ(target.tensor.raw(), buffer.raw());
    EXPECT_FALSE(x.grad_target(ex).fresh);
    EXPECT_EQ(buffer.data<float>()[5], 7.0f);  // the first that adds sets it
    x.unset_grad(ex);
    EXPECT_EQ(x.grad(ex).raw(), buffer.raw());
    for (int i = 0; i < 6; ++i) EXPECT_EQ(buffer.data<float>()[i], 0.0f);
}

TEST(Var, AnotherValueHasTheSameGradient) {
    const Exec ex = make_cpu_exec(1);
    const Var x(Tensor::zeros({2, 3}), true), slice = x.columns(1, 3);
    const Tensor other = Tensor::zeros({2, 2}, DType::bf16);
    const Var twin = slice.with_value(other);
    EXPECT_EQ(twin.value().raw(), other.raw());
    EXPECT_EQ(twin.grad_dtype(), DType::f32);
    EXPECT_TRUE(twin.grad_target(ex).fresh);
    EXPECT_EQ(twin.grad(ex).raw(), slice.grad(ex).raw());
    slice.forget_value();
    EXPECT_EQ(twin.value().raw(), other.raw());
}

TEST(Ctx, RecordsOnlyWhatWantsAGradient) {
    const Exec ex = make_cpu_exec(1);
    Tape tape;
    const Var constant(Tensor::from_floats({1, 2}, {1, 2})), wanted = variable({1, 2}, 1);
    Ctx ctx{.exec = ex, .tape = &tape};
    EXPECT_FALSE(multiply(ctx, constant, constant).requires_grad());
    EXPECT_EQ(tape.size(), 0u);
    EXPECT_TRUE(multiply(ctx, constant, wanted).requires_grad());
    EXPECT_EQ(tape.size(), 1u);
    Ctx inference{.exec = ex};
    EXPECT_FALSE(multiply(inference, constant, wanted).requires_grad());
    tape.backward();
    EXPECT_FALSE(constant.has_grad());
}

// sum(g * f(inputs)) differentiated by the tape against differences of the same in f32. `f` builds the graph.
void expect_differentiates(const std::vector<Var>& inputs, const std::function<Var(Ctx&)>& f,
                           CuSeqlens cu_seqlens = {}) {
    const Exec ex = make_cpu_exec(1);
    poison(ex);
    Tape tape;
    Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = cu_seqlens};
    const Var y = f(ctx);
    const auto g = Random(99).vector(y.value().size());
    const auto loss = [&] {
        Ctx inference{.exec = ex, .cu_seqlens = cu_seqlens};
        const auto out = values(f(inference).value());
        double sum = 0;
        for (size_t i = 0; i < out.size(); ++i)
            sum += static_cast<double>(out[i]) * static_cast<double>(g[i]);
        return sum;
    };
    for (const Var& x : inputs) {
        const Tensor grad = x.grad(ex);
        for (int64_t i = 0; i < grad.size(); ++i) grad.data<float>()[i] = kGradientStart;
    }
    backward_from(ex, tape, y, g);
    for (size_t n = 0; n < inputs.size(); ++n) {
        std::vector<double> expected;
        for (int64_t i = 0; i < inputs[n].value().size(); ++i) {
            float& x = inputs[n].value().data<float>()[i];
            const float keep = x, step = 1.0f / 128;
            x = keep + step;
            const double up = loss();
            x = keep - step;
            const double down = loss();
            x = keep;
            expected.push_back((up - down) / (2 * static_cast<double>(step)));
        }
        // f32 and a wide step: three digits. That is enough for wiring; the operators' own tests are sharp.
        expect_close(added(values(inputs[n].grad(ex))), expected, 2e-3, std::to_string(n).c_str());
    }
}

TEST(Derivatives, Elementwise) {
    const Var a = variable({3, 5}, 1), b = variable({3, 5}, 2);
    expect_differentiates({a, b}, [&](Ctx& c) { return add(c, a, b); });
    expect_differentiates({a, b}, [&](Ctx& c) { return multiply(c, a, b); });
    expect_differentiates({a}, [&](Ctx& c) { return silu(c, a); });
    expect_differentiates({a}, [&](Ctx& c) { return softplus(c, a); });
    expect_differentiates({a}, [&](Ctx& c) { return neg_exp(c, a); });
    const Var vector = variable({7}, 3);
    expect_differentiates({vector}, [&](Ctx& c) { return neg_exp(c, vector); });
}

// A value used twice gets both gradients; also when both uses are the same function.
TEST(Derivatives, FanOut) {
    const Var a = variable({2, 3}, 1);
    expect_differentiates({a}, [&](Ctx& c) { return multiply(c, a, a); });
    expect_differentiates({a}, [&](Ctx& c) { return add(c, silu(c, a), multiply(c, a, softplus(c, a))); });
    const Var wide = variable({2, 6}, 2);
    expect_differentiates({wide},
                          [&](Ctx& c) { return multiply(c, wide.columns(0, 3), wide.columns(3, 6)); });
    expect_differentiates({wide},
                          [&](Ctx& c) { return multiply(c, wide.columns(0, 4), wide.columns(2, 6)); });
}

TEST(Derivatives, LinearAndEmbedding) {
    const Var x = variable({4, 3}, 1), weight = variable({5, 3}, 2), bias = variable({5}, 3);
    expect_differentiates({x, weight, bias}, [&](Ctx& c) { return linear(c, x, weight, bias); });
    expect_differentiates({x, weight}, [&](Ctx& c) { return linear(c, x, weight, Var()); });
    const std::vector<int32_t> ids{2, 0, 2, 4};
    expect_differentiates({weight}, [&](Ctx& c) {
        return embedding(c, on_device_of(c.exec, View<const int32_t, 1>(ids.data(), {4})), weight);
    });
}

TEST(Derivatives, Norms) {
    using Gate = RmsNormOptions::Gate;
    const Var x = variable({3, 6}, 1), z = variable({3, 6}, 2), w = variable({6}, 3, 0.5f, 1.5f);
    expect_differentiates({x, w}, [&](Ctx& c) { return rms_norm(c, x, w, Var(), {}, DType::f32); });
    expect_differentiates({x}, [&](Ctx& c) { return rms_norm(c, x, Var(), Var(), {}, DType::f32); });
    for (const Gate gate : {Gate::before, Gate::after}) {
        const RmsNormOptions options{.groups = 2, .gate = gate};
        expect_differentiates({x, w, z}, [&](Ctx& c) { return rms_norm(c, x, w, z, options, DType::f32); });
    }
}

// The residual stream: read by the norm, passed on, and read again by the next block.
TEST(Derivatives, ResidualStream) {
    const Var x = variable({3, 4}, 1), w = variable({4}, 2, 0.5f, 1.5f);
    expect_differentiates({x, w}, [&](Ctx& c) {
        // Inference adds in place; the start must not be changed by it.
        Normed s{c.tape != nullptr ? x : Var(x.value().clone()), {}};
        Var y;
        for (int block = 0; block < 3; ++block) {
            s = add_rms_norm(c, s.residual, y, w, {}, DType::f32);
            y = silu(c, s.y);
        }
        return add_rms_norm(c, s.residual, y, w, {}, DType::f32).y;
    });
    expect_differentiates({x, w}, [&](Ctx& c) {
        const Normed s =
            add_rms_norm(c, c.tape != nullptr ? x : Var(x.value().clone()), silu(c, x), w, {}, DType::f32);
        return multiply(c, s.residual, s.y);
    });
}

TEST(Derivatives, Convolution) {
    const int64_t cu_seqlens[] = {0, 1, 4, 9};
    const Var x = variable({9, 6}, 1), weight = variable({3, 1, 4}, 2), bias = variable({3}, 3);
    expect_differentiates(
        {x, weight, bias},
        [&](Ctx& c) { return causal_conv1d(c, x.columns(2, 5), weight, bias, Activation::silu, nullptr); },
        cu_seqlens);
    expect_differentiates(
        {x, weight},
        [&](Ctx& c) { return causal_conv1d(c, x.columns(0, 3), weight, Var(), Activation::none, nullptr); },
        cu_seqlens);
}

// u, delta and z are slices that overlap, of values whose gradients are fresh; more than one block of
// channels, because within one the order of the writes hides what goes wrong.
TEST(Derivatives, SelectiveScanOfOverlappingSlices) {
    const int64_t cu_seqlens[] = {0, 2, 6};
    const Var x = variable({6, 22}, 1), A = variable({20, 2}, 2), bc = variable({6, 4}, 3);
    for (const int64_t shift : {0, 1, 2}) {
        expect_differentiates(
            {x, A, bc},
            [&](Ctx& c) {
                const Var v = silu(c, x), w = silu(c, bc);
                return selective_scan(
                    c,
                    {v.columns(0, 20), v.columns(2 - shift, 22 - shift), neg_exp(c, A), w.columns(0, 2),
                     w.columns(shift, shift + 2), Var(), v.columns(shift, shift + 20), Var()},
                    nullptr);
            },
            cu_seqlens);
    }
}

TEST(Derivatives, CrossEntropy) {
    const Exec ex = make_cpu_exec(1);
    const Var hidden = variable({4, 3}, 1), weight = variable({5, 3}, 2);
    const std::vector<int32_t> ids{1, -1, 4, 0};
    const Tensor targets = on_device_of<int32_t>(ex, {ids.data(), {4}});
    const Tensor weights = Tensor::from_floats({4}, {0.5f, 7.0f, 0.25f, 1.5f});
    Tape tape;
    Ctx ctx{.exec = ex, .tape = &tape}, inference{.exec = ex};
    const Var loss = linear_cross_entropy(ctx, hidden, weight, targets, weights);
    tape.backward();
    const auto value = [&] {
        return linear_cross_entropy(inference, hidden, weight, targets, weights).value().item();
    };
    EXPECT_NEAR(loss.value().item(), value(), 1e-5);
    for (const Var& v : {hidden, weight}) {
        std::vector<double> expected;
        for (int64_t i = 0; i < v.value().size(); ++i) {
            float& x = v.value().data<float>()[i];
            const float keep = x;
            x = keep + 1.0f / 64;
            const double above = static_cast<double>(value());
            x = keep - 1.0f / 64;
            expected.push_back((above - static_cast<double>(value())) * 32);
            x = keep;
        }
        expect_close(values(v.grad(ex)), expected, 2e-3, "cross_entropy");
    }
}

// Two layers, the second's inputs both results of the first: the same bytes with and without recomputation.
TEST(Tape, RecomputedGivesTheSameGradients) {
    const Exec ex = make_cpu_exec(1);
    std::vector<std::vector<float>> gradients[2];
    size_t recorded[2] = {};
    for (const bool recompute : {false, true}) {
        const Var x = variable({3, 4}, 1), w = variable({4, 4}, 2), norm = variable({4}, 3);
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape, .recompute = recompute ? Recompute::layers : Recompute::none};
        std::vector<Var> stream{x, Var()};
        for (int layer = 0; layer < 2; ++layer) {
            stream = recomputed(ctx, stream, [&](Ctx& c, const std::vector<Var>& in) {
                const Normed n = add_rms_norm(c, in[0], in[1], norm, {}, DType::f32);
                return std::vector<Var>{n.residual, silu(c, linear(c, n.y, w, Var()))};
            });
        }
        recorded[recompute] = tape.size();
        const Var y = add_rms_norm(ctx, stream[0], stream[1], norm, {}, DType::f32).y;
        const std::vector<float> input = values(x.value());
        backward_from(ex, tape, y, Random(4).vector(12));
        EXPECT_EQ(values(x.value()), input);
        for (const Var& v : {x, w, norm}) gradients[recompute].push_back(values(v.grad(ex)));
    }
    EXPECT_EQ(gradients[0], gradients[1]);
    EXPECT_GT(std::abs(gradients[0][0][0]), 1e-3);
    EXPECT_EQ(recorded[1], 2u);
    EXPECT_GT(recorded[0], 4u);
}

TEST(Var, ForgetsAValueAndItsSlicesAndTakesAnother) {
    const Exec ex = make_cpu_exec(1);
    const Var x(Tensor::zeros(ex, {64, 6}), true, DType::f32), slice = x.columns(1, 3);
    const size_t before = ex.allocator->bytes_in_use();
    x.forget_value();
    EXPECT_LT(ex.allocator->bytes_in_use(), before);
    EXPECT_EQ(slice.value().shape(), (Shape{64, 2}));
    EXPECT_FALSE(x.value() || slice.value());
    EXPECT_EQ(x.grad(ex).shape(), (Shape{64, 6}));
    slice.add_grad(ex, Tensor::zeros(ex, {64, 2}));
    std::vector<float> ramp(64 * 6);
    for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = static_cast<float>(i);
    x.set_value(Tensor::from_floats({64, 6}, ramp));
    EXPECT_EQ((slice.value().view<float, 2>()(2, 1)), 14.0f);
    EXPECT_EQ(slice.value().raw(), x.value().raw() + sizeof(float));
}

// b = silu(a) is read by two functions and by slices; c = softplus(b) is remade from what is remade.
TEST(Tape, RemadeGivesTheSameGradientsInLessMemory) {
    std::vector<std::vector<float>> gradients[2];
    size_t kept[2] = {};
    int made = 0;
    for (const bool cheap : {false, true}) {
        const Exec ex = make_cpu_exec(1);
        const Var a = variable({300, 4}, 1), w = variable({4, 4}, 2), v = variable({4, 2}, 3);
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape, .recompute = cheap ? Recompute::cheap : Recompute::none};
        Var y;
        {
            const auto make_b = [&, a](Ctx& c) {
                made += c.tape == nullptr;
                return silu(c, a);
            };
            const Var b = make_b(ctx), c = softplus(ctx, b);
            const Var d = multiply(ctx, linear(ctx, c, w, Var()), b);
            y = linear(ctx, multiply(ctx, d.columns(0, 2), b.columns(2, 4)), v, Var());
            remade(ctx, c, [b](Ctx& again) { return softplus(again, b); });
            remade(ctx, b, make_b);
            EXPECT_EQ(static_cast<bool>(b.value()), !cheap);
        }
        kept[cheap] = ex.allocator->bytes_in_use();
        backward_from(ex, tape, y, Random(4).vector(1200));
        for (const Var& p : {a, w, v}) gradients[cheap].push_back(values(p.grad(ex)));
    }
    EXPECT_EQ(gradients[0], gradients[1]);
    EXPECT_GT(std::abs(gradients[0][0][0]), 1e-3);
    EXPECT_EQ(made, 1);
    EXPECT_LE(kept[1] + 2 * 300 * 4 * sizeof(float), kept[0]);
}

// A linear whose input comes once more only behind its own backward function.
TEST(Tape, AWeightsGradientWaitsForItsInput) {
    const Exec ex = make_cpu_exec(1);
    std::vector<std::vector<float>> gradients[2];
    for (const bool late : {false, true}) {
        const Var a = variable({5, 4}, 1), w = variable({3, 4}, 2), bias = variable({3}, 3);
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape};
        const Var x = silu(ctx, a);
        if (late) tape.record([x, value = x.value().clone()] { x.set_value(value); });
        const Var y = linear(ctx, x, w, bias);
        if (late) x.forget_value();
        backward_from(ex, tape, y, Random(4).vector(15));
        for (const Var& v : {a, w, bias}) gradients[late].push_back(values(v.grad(ex)));
    }
    EXPECT_EQ(gradients[0], gradients[1]);
    EXPECT_GT(std::abs(gradients[0][1][0]), 1e-3);
}

// A state is carried in inference only: its gradient would be lost.
TEST(Derivatives, StateNeedsInference) {
    const Exec ex = make_cpu_exec(1);
    Tape tape;
    const int64_t cu_seqlens[] = {0, 4};
    Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = cu_seqlens};
    Tensor state = Tensor::zeros({1, 3, 3});
    const Var x = variable({4, 3}, 1), weight = variable({3, 1, 4}, 2);
    EXPECT_EQ(error_of([&] { causal_conv1d(ctx, x, weight, Var(), Activation::silu, &state); }),
              "[causal_conv1d] a carried state is for inference, without a tape");
}

}  // namespace
}  // namespace ssm::test
