// norm_linear on a GPU against the CPU's operators.
#include "ssm/ops/norm_linear/norm_linear.h"

#include <gtest/gtest.h>

#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm::test {
namespace {

using Gate = RmsNormOptions::Gate;

struct Case {
    int64_t t, o, i;
    int64_t groups = 0;  // 0: no norm
    Gate gate = Gate::none;
    bool weighted = true, bias = true, add = false;
    int64_t taps = 0, first = 0, channels = 0;  // taps 0: no convolution
    bool slots = false;
    int64_t apart = 0;  // columns before x and y in wider tensors
    bool ask_first = false;
};

Tensor random_tensor(Random& random, const Shape& shape, DType dtype, float scale = 1.0f) {
    return Tensor::from_floats(shape, random.vector(element_count(shape), -scale, scale)).to(dtype);
}

std::vector<float> floats(const Tensor& t) {
    const Tensor dense = (t.dense() ? t : t.clone()).to_host().to(DType::f32);
    return {dense.data<float>(), dense.data<float>() + dense.size()};
}

// The operands on one device; `y` and `state` are its own.
struct Operands {
    Tensor x, z, weight, norm_weight, bias, taps, conv_bias, state, slots, y;

    Operands on(const Exec& ex) const {
        const auto moved = [&](const Tensor& t) { return t ? t.clone().to(ex) : Tensor(); };
        return {moved(x),    moved(z),         moved(weight), moved(norm_weight), moved(bias),
                moved(taps), moved(conv_bias), moved(state),  moved(slots),       moved(y)};
    }
};

Operands random_operands(const Case& c, DType x, DType w, DType y) {
    Random random(static_cast<uint64_t>(c.t * 131 + c.o * 17 + c.i));
    Operands a;
    a.x = random_tensor(random, {c.t, c.i + c.apart}, x);
    if (c.gate != Gate::none) a.z = random_tensor(random, {c.t, c.i + c.apart}, w);
    a.weight = random_tensor(random, {c.o, c.i}, w, 1.0f / std::sqrt(static_cast<float>(c.i)));
    if (c.weighted && c.groups > 0) a.norm_weight = random_tensor(random, {c.i}, DType::f32);
    if (c.bias) a.bias = random_tensor(random, {c.o}, DType::f32);
    a.y = c.add ? random_tensor(random, {c.t, c.o + c.apart}, y)
                : Tensor::from_floats({c.t, c.o + c.apart}, nan_vector(c.t * (c.o + c.apart))).to(y);
    if (c.taps == 0) return a;
    a.taps = random_tensor(random, {c.channels, c.taps}, DType::f32);
    a.conv_bias = random_tensor(random, {c.channels}, DType::f32);
    a.state = random_tensor(random, {c.t + 3, c.taps - 1, c.channels}, y);
    if (c.slots) {
        a.slots = Tensor::empty({c.t}, DType::i32);
        for (int64_t s = 0; s < c.t; ++s) a.slots.data<int32_t>()[s] = static_cast<int32_t>(c.t + 2 - s);
    } else {
        a.state = a.state.rows(0, c.t).clone();
    }
    return a;
}

void run(const Exec& ex, const Case& c, const Operands& a) {
    NormLinearInputs in{.x = a.x.columns(c.apart, c.apart + c.i),
                        .norm_weight = a.norm_weight.view_if<const float, 1>(),
                        .weight = PackedWeight(a.weight),
                        .bias = a.bias.view_if<const float, 1>()};
    if (c.groups > 0) in.norm = RmsNormOptions{.eps = 1e-3f, .groups = c.groups, .gate = c.gate};
    if (a.z) in.z = a.z.columns(c.apart, c.apart + c.i);
    NormLinearEnd end{.add = c.add, .next = a.weight, .ask_first = c.ask_first};
    if (c.taps > 0)
        end.conv = ConvStep{.first = c.first,
                            .weight = a.taps.view<const float, 2>(),
                            .bias = a.conv_bias.view<const float, 1>(),
                            .state = a.state,
                            .slots = a.slots.view_if<const int32_t, 1>()};
    norm_linear(ex, in, a.y.columns(c.apart, c.apart + c.o), end);
}

void expect_like_the_cpu(const Case& c, DType x, DType w, DType y) {
    SCOPED_TRACE(fmt::format("t {} o {} i {} groups {} gate {} add {} taps {} apart {} x {} w {} y {}", c.t,
                             c.o, c.i, c.groups, static_cast<int>(c.gate), c.add, c.taps, c.apart, name_of(x),
                             name_of(w), name_of(y)));
    const double tolerance = w == DType::bf16 ? 1e-2 : 1e-5;
    const Operands host = random_operands(c, x, w, y), here = host.on(make_cpu_exec(1)),
                   there = host.on(cuda_exec());
    const Exec cpu = make_cpu_exec(1);
    run(cpu, c, here);
    run(cuda_exec(), c, there);
    const auto columns = [&](const Operands& a) {
        return floats(a.y.columns(c.apart, c.apart + c.o).clone());
    };
    expect_close(columns(there), columns(here), tolerance, "y");
    if (c.taps > 1) expect_close(floats(there.state), floats(here.state), tolerance, "state");
    if (c.apart == 0) return;
    const auto beside = [&](const Operands& a) { return floats(a.y.columns(0, c.apart).clone()); };
    EXPECT_LE(relative_l2(beside(there), beside(host)), 0.0);  // what is not y's stays
}

void expect_for_bf16_weights(const Case& c) {
    if (c.gate == Gate::none)
        expect_like_the_cpu(c, DType::f32, DType::bf16, c.add ? DType::f32 : DType::bf16);
    expect_like_the_cpu(c, DType::bf16, DType::bf16, DType::f32);
}

void expect_for_all_types(const Case& c) {
    expect_like_the_cpu(c, DType::f32, DType::f32, DType::f32);
    expect_for_bf16_weights(c);
}

TEST(NormLinearCuda, Sizes) {
    for (const int64_t t : {1, 2, 3, 8, 9, 16, 20, 32, 33, 128, 131})
        for (const auto& [o, i] : {std::pair<int64_t, int64_t>{1, 8},
                                   {5, 3},
                                   {40, 48},
                                   {67, 264},
                                   {33, 1536},
                                   {700, 768},
                                   {1100, 24},
                                   {40, 4104},
                                   {18, 8200}}) {
            expect_for_all_types({.t = t, .o = o, .i = i});
            expect_for_all_types({.t = t, .o = o, .i = i, .groups = 1});
        }
}

TEST(NormLinearCuda, ManyRowsOfTheWeight) {
    for (const int64_t t : {1, 4, 8}) {
        expect_for_all_types({.t = t, .o = 3352, .i = 768, .groups = 1, .bias = false});
        expect_for_all_types({.t = t, .o = 20011, .i = 256, .groups = 1});
        expect_for_all_types({.t = t, .o = 9000, .i = 520});
    }
    for (const int64_t t : {13, 19, 40}) expect_for_all_types({.t = t, .o = 9000, .i = 520, .groups = 1});
    expect_for_all_types({.t = 5, .o = 9000, .i = 4104, .groups = 1});  // several tiles of a cluster
}

// Of up to 2 rows of x, through rings in shared memory.
TEST(NormLinearCuda, LargeWeights) {
    expect_for_bf16_weights({.t = 2, .o = 34001, .i = 1024, .groups = 1, .add = true});  // many a warp
    for (const int64_t t : {1, 2, 3}) {
        expect_for_bf16_weights({.t = t, .o = 2050, .i = 2048, .groups = 1, .add = true});
        expect_for_bf16_weights({.t = t, .o = 1027, .i = 4104, .bias = false});  // a piece of 16 bytes
        for (const Gate gate : {Gate::before, Gate::after})
            expect_for_bf16_weights({.t = t, .o = 1100, .i = 4096, .groups = 1, .gate = gate, .add = true});
        Case c{.t = t,
               .o = 4501,
               .i = 1032,
               .groups = 1,
               .taps = 4,
               .first = 5,
               .channels = 3000,
               .slots = true};
        expect_for_bf16_weights(c);
        c.apart = 8;
        expect_for_bf16_weights(c);
        c.apart = 3;
        expect_for_bf16_weights(c);
        c.apart = 0;
        c.ask_first = true;
        expect_for_bf16_weights(c);
    }
}

// Of up to 4 rows of x, by one round of small blocks.
TEST(NormLinearCuda, SmallWeights) {
    for (const int64_t t : {1, 2, 3}) {
        for (const auto& [o, i] :
             {std::pair<int64_t, int64_t>{160, 4096}, {161, 2056}, {768, 1536}, {1001, 520}})
            for (const Gate gate : {Gate::none, Gate::before, Gate::after}) {
                expect_for_bf16_weights({.t = t, .o = o, .i = i, .groups = 1, .gate = gate, .add = true});
                expect_for_bf16_weights({.t = t, .o = o, .i = i, .bias = false, .apart = 8});
            }
        expect_for_bf16_weights({.t = t,
                                 .o = 3350,
                                 .i = 768,
                                 .groups = 1,
                                 .taps = 4,
                                 .first = 1536,
                                 .channels = 1792,
                                 .slots = true});
    }
}

// Of 5 rows of x and more: x_proj's.
TEST(NormLinearCuda, SmallWeightsWithManyRows) {
    for (const int64_t t : {5, 16, 33, 77, 128, 131, 300}) {
        for (const auto& [o, i] : {std::pair<int64_t, int64_t>{80, 1536}, {160, 4096}, {5, 8192}})
            for (const int64_t apart : {0, 8, 3}) {
                const Case c{.t = t, .o = o, .i = i, .bias = false, .apart = apart};
                expect_for_bf16_weights(c);
                expect_like_the_cpu(c, DType::bf16, DType::bf16, DType::bf16);
            }
        expect_for_bf16_weights({.t = t, .o = 80, .i = 1536, .add = true});
        for (const int64_t taps : {3, 4})
            expect_for_bf16_weights(
                {.t = t, .o = 90, .i = 1544, .taps = taps, .first = 7, .channels = 60, .slots = true});
    }
}

TEST(NormLinearCuda, NormsAndGates) {
    for (const int64_t t : {1, 3, 8, 10, 40})
        for (const Gate gate : {Gate::none, Gate::before, Gate::after})
            for (const int64_t groups : {1, 2, 6})
                for (const bool weighted : {true, false}) {
                    Case c{.t = t, .o = 50, .i = 96, .groups = groups, .gate = gate, .weighted = weighted};
                    expect_for_all_types(c);
                    c.add = true;
                    expect_for_all_types(c);
                    c.apart = 3;
                    expect_for_all_types(c);
                }
}

TEST(NormLinearCuda, Convolution) {
    for (const int64_t t : {1, 3, 8, 10, 32, 70})
        for (const int64_t taps : {2, 3, 4, 6})
            for (const bool slots : {false, true}) {
                Case c{.t = t,
                       .o = 90,
                       .i = 64,
                       .groups = 1,
                       .taps = taps,
                       .first = 7,
                       .channels = 60,
                       .slots = slots};
                expect_for_all_types(c);
                c.apart = 5;
                c.bias = false;
                expect_for_all_types(c);
            }
}

}  // namespace
}  // namespace ssm::test
