// Modules: what they own, how it starts, and that inference and recording agree. The mixers' mathematics is
// tested in whole models: ssm/models/<architecture>.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "ssm/nn/linear.h"
#include "ssm/nn/mamba.h"
#include "ssm/nn/mamba2.h"
#include "tests/support/compare.h"

namespace ssm::test {
namespace {

std::vector<float> values(const Tensor& t) {
    return {t.data<const float>(), t.data<const float>() + t.size()};
}

void initialise(Parameter& p, uint64_t seed) {
    ssm::Random random(seed);
    const Tensor value = Tensor::empty(p.shape);
    p.init(random, value);
    p.var = Var(value);
}

TEST(Linear, RecordingAndInferenceAgree) {
    const Exec ex = make_cpu_exec(1);
    Linear layer(5, 7, true);
    layer.visit("layer", [](const std::string&, Parameter& p) { initialise(p, 3); });
    layer.bias.value().data<float>()[2] = 4.0f;
    // So many rows that the product takes the packed copy of the weight.
    const Var x(Tensor::from_floats({90, 5}, Random(1).vector(450)));
    const auto inference = [&] {
        Ctx ctx{.exec = ex};
        return values(layer.forward(ctx, x).value());
    };
    const auto recorded = [&] {
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape};
        return values(layer.forward(ctx, x).value());
    };
    expect_close(inference(), recorded(), 1e-6, "at first");
    // A step of training changes the weight in place; the packed copy must not survive it.
    recorded();
    for (int i = 0; i < 35; ++i) layer.weight.value().data<float>()[i] *= -2.0f;
    expect_close(inference(), recorded(), 1e-6, "after a step");
    // So must another tensor in its place.
    layer.weight.var = Var(Tensor::from_floats({7, 5}, Random(2).vector(35)));
    expect_close(inference(), recorded(), 1e-6, "replaced");
    Ctx ctx{.exec = ex};
    auto without = values(layer.forward_no_bias(ctx, x).value());
    for (size_t i = 0; i < without.size(); ++i) without[i] += layer.bias.value().data<float>()[i % 7];
    expect_close(without, inference(), 1e-6, "bias");
}

TEST(Init, StepSizes) {
    const Tensor t = Tensor::empty({2000});
    ssm::Random random(1);
    init::dt_bias(1e-3, 1e-1, 1e-4)(random, t);
    double least = 1, most = 0, logs = 0;
    for (int64_t i = 0; i < t.size(); ++i) {
        const double dt = std::log1p(std::exp(static_cast<double>(t.data<float>()[i])));
        least = std::min(least, dt);
        most = std::max(most, dt);
        logs += std::log(dt) / 2000;
    }
    // softplus of the bias covers 0.001 .. 0.1, evenly in the logarithm.
    EXPECT_GT(least, 0.99e-3);
    EXPECT_LT(least, 1.1e-3);
    EXPECT_LT(most, 1.01e-1);
    EXPECT_GT(most, 0.9e-1);
    EXPECT_NEAR(logs, std::log(1e-2), 0.1);
    init::dt_bias(1e-6, 1e-5, 1e-4)(random, t);  // the floor
    for (int64_t i = 0; i < t.size(); ++i)
        EXPECT_NEAR(std::log1p(std::exp(static_cast<double>(t.data<float>()[i]))), 1e-4, 1e-8);
}

// Names, shapes and what is decayed: the published recipe.
TEST(Mixers, Parameters) {
    const auto list = [](Mixer& mixer) {
        std::set<std::string> all;
        mixer.visit("m", [&](const std::string& name, Parameter& p) {
            EXPECT_TRUE(all.insert(fmt::format("{} {}{}{}", name, to_string(p.shape),
                                               p.kind == Parameter::Kind::matrix ? " matrix" : "",
                                               p.weight_decay ? " decay" : ""))
                            .second);
        });
        return all;
    };
    MambaMixer mamba({.e = 8, .d = 16, .n = 4, .k = 3, .r = 2, .projection_bias = true});
    EXPECT_EQ(list(mamba),
              (std::set<std::string>{"m.A_log [16, 4]", "m.D [16]", "m.conv1d.weight [16, 1, 3] decay",
                                     "m.conv1d.bias [16]", "m.in_proj.weight [32, 8] matrix decay",
                                     "m.in_proj.bias [32]", "m.x_proj.weight [10, 16] matrix decay",
                                     "m.dt_proj.weight [16, 2] matrix decay", "m.dt_proj.bias [16]",
                                     "m.out_proj.weight [8, 16] matrix decay", "m.out_proj.bias [8]"}));
    Mamba2Mixer mamba2(
        {.e = 8, .h = 4, .p = 4, .g = 2, .n = 5, .k = 3, .conv_bias = false, .D_has_hdim = true});
    EXPECT_EQ(list(mamba2), (std::set<std::string>{"m.A_log [4]", "m.D [16]", "m.dt_bias [4]",
                                                   "m.conv1d.weight [36, 1, 3] decay", "m.norm.weight [16]",
                                                   "m.in_proj.weight [56, 8] matrix decay",
                                                   "m.out_proj.weight [8, 16] matrix decay"}));
}

TEST(Mixers, StartingValues) {
    MambaMixer mamba({.e = 8, .d = 16, .n = 4, .r = 2, .layers = 4});
    mamba.visit("", [](const std::string& name, Parameter& p) {
        initialise(p, 1);
        const auto v = values(p.value());
        const float largest = std::abs(*std::ranges::max_element(v, {}, [](float x) { return std::abs(x); }));
        if (name == ".A_log") {
            for (size_t i = 0; i < v.size(); ++i)
                EXPECT_FLOAT_EQ(std::exp(v[i]), static_cast<float>(i % 4 + 1));
        } else if (name == ".D") {
            EXPECT_EQ(v, std::vector<float>(16, 1.0f));
        } else if (name == ".out_proj.weight") {
            EXPECT_LE(largest, 0.125f);  // 1/sqrt(16), over sqrt(4 layers)
            EXPECT_GT(largest, 0.1f);
        } else if (name == ".dt_proj.weight") {
            EXPECT_LE(largest, 0.7072f);  // 1/sqrt(r)
            EXPECT_GT(largest, 0.5f);
        }
    });
    Mamba2Mixer mamba2({.e = 8, .h = 64, .p = 1, .g = 1, .n = 5});
    mamba2.visit("", [](const std::string& name, Parameter& p) {
        initialise(p, 1);
        const auto v = values(p.value());
        if (name != ".A_log") return;
        for (const float x : v) {  // A uniform in 1 .. 16
            EXPECT_GE(x, 0.0f);
            EXPECT_LE(std::exp(x), 16.0f);
        }
        EXPECT_GT(*std::ranges::max_element(v), std::log(8.0f));
        EXPECT_LT(*std::ranges::min_element(v), std::log(8.0f));
    });
}

TEST(Mixers, States) {
    const auto shapes = [](const Mixer& mixer, DType activation) {
        std::set<std::string> all;
        mixer.new_state(make_cpu_exec(1), 3, {activation})
            ->visit("s", [&](const std::string& name, Tensor& t) {
                all.insert(fmt::format("{} {} {}", name, to_string(t.shape()), name_of(t.dtype())));
                for (const std::byte* b = t.raw(); b != t.raw() + t.bytes(); ++b) EXPECT_EQ(*b, std::byte{0});
            });
        return all;
    };
    EXPECT_EQ(shapes(MambaMixer({.e = 8, .d = 16, .n = 4, .k = 3, .r = 2}), DType::f32),
              (std::set<std::string>{"s.conv [3, 2, 16] f32", "s.ssm [3, 16, 4] f32"}));
    // The recurrent state stays f32, whatever the activations are.
    EXPECT_EQ(shapes(Mamba2Mixer({.e = 8, .h = 4, .p = 4, .g = 2, .n = 5}), DType::bf16),
              (std::set<std::string>{"s.conv [3, 3, 36] bf16", "s.ssm [3, 4, 4, 5] f32"}));
}

}  // namespace
}  // namespace ssm::test
