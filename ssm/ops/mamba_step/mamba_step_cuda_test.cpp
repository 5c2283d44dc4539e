// mamba_step on a GPU against the CPU's operators.
#include "ssm/ops/mamba_step/mamba_step.h"

#include <gtest/gtest.h>

#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm::test {
namespace {

struct Case {
    int64_t t, d, n, r;
    bool normed = false, slots = true, optional = true;
    int64_t apart = 0;
};

Tensor random_tensor(Random& random, const Shape& shape, DType dtype, float low = -1.0f, float high = 1.0f) {
    return Tensor::from_floats(shape, random.vector(element_count(shape), low, high)).to(dtype);
}

std::vector<float> floats(const Tensor& t) {
    const Tensor dense = (t.dense() ? t : t.clone()).to_host().to(DType::f32);
    return {dense.data<float>(), dense.data<float>() + dense.size()};
}

struct Operands {
    Tensor xz, dbc, weight, bias, A, D, state, slots, y;

    Operands on(const Exec& ex) const {
        const auto moved = [&](const Tensor& t) { return t ? t.clone().to(ex) : Tensor(); };
        return {moved(xz), moved(dbc),   moved(weight), moved(bias), moved(A),
                moved(D),  moved(state), moved(slots),  moved(y)};
    }
};

void run(const Exec& ex, const Case& c, const Operands& a) {
    MambaStepInputs in{.x = a.xz.columns(c.apart, c.apart + c.d),
                       .dbc = a.dbc.columns(c.apart, c.apart + c.r + 2 * c.n),
                       .z = a.xz.columns(c.apart + c.d, c.apart + 2 * c.d),
                       .dt_weight = PackedWeight(a.weight),
                       .dt_bias = a.bias.view_if<const float, 1>(),
                       .A = a.A.view<const float, 2>(),
                       .D = a.D.view_if<const float, 1>(),
                       .slots = a.slots.view_if<const int32_t, 1>(),
                       .next = a.weight};
    if (c.normed) in.norm_eps = 1e-4f;
    mamba_step(ex, in, a.state, a.y);
}

void expect_like_the_cpu(const Case& c, DType type, DType weight, DType states = DType::f32) {
    SCOPED_TRACE(fmt::format("t {} d {} n {} r {} normed {} slots {} apart {} {} {} {}", c.t, c.d, c.n, c.r,
                             c.normed, c.slots, c.apart, name_of(type), name_of(weight), name_of(states)));
    Random random(static_cast<uint64_t>(c.t + 100 * c.d + c.n));
    Operands host{.xz = random_tensor(random, {c.t, c.apart + 2 * c.d}, type),
                  .dbc = random_tensor(random, {c.t, c.apart + c.r + 2 * c.n}, DType::f32),
                  .weight = random_tensor(random, {c.d, c.r}, weight),
                  .A = random_tensor(random, {c.d, c.n}, DType::f32, -2.0f, -0.1f),
                  .state = random_tensor(random, {c.slots ? c.t + 2 : c.t, c.d, c.n}, states),
                  .y = Tensor::from_floats({c.t, c.d}, nan_vector(c.t * c.d)).to(type)};
    if (c.optional) {
        host.bias = random_tensor(random, {c.d}, DType::f32);
        host.D = random_tensor(random, {c.d}, DType::f32);
    }
    if (c.slots) {
        host.slots = Tensor::empty({c.t}, DType::i32);
        for (int64_t s = 0; s < c.t; ++s) host.slots.data<int32_t>()[s] = static_cast<int32_t>(c.t + 1 - s);
    }
    const Exec cpu = make_cpu_exec(1);
    const Operands there = host.on(cuda_exec());
    host.state = host.state.to(DType::f32);  // what the CPU has, exactly the rounded numbers
    const Operands here = host.on(cpu);
    run(cpu, c, here);
    run(cuda_exec(), c, there);
    const double tolerance = type == DType::bf16 || weight == DType::bf16 ? 1e-2 : 1e-5;
    expect_close(floats(there.y), floats(here.y), tolerance, "y");
    expect_close(floats(there.state), floats(here.state), states == DType::bf16 ? 1e-2 : tolerance, "state");
}

// bf16 states: y as exact as with f32 states, the new states rounded once.
void expect_like_the_cpu_in_bf16_states(const Case& c) {
    expect_like_the_cpu(c, DType::f32, DType::f32, DType::bf16);
    expect_like_the_cpu(c, DType::bf16, DType::bf16, DType::bf16);
}

TEST(MambaStepCuda, ManyStates) {
    expect_like_the_cpu({.t = 100, .d = 1544, .n = 16, .r = 48, .normed = true}, DType::bf16, DType::bf16);
    expect_like_the_cpu({.t = 93, .d = 1600, .n = 16, .r = 128}, DType::f32, DType::f32);
    expect_like_the_cpu_in_bf16_states({.t = 100, .d = 1544, .n = 16, .r = 48, .normed = true});
    expect_like_the_cpu_in_bf16_states({.t = 93, .d = 1600, .n = 16, .r = 160});
}

TEST(MambaStepCuda, LikeTheCpu) {
    for (const int64_t t : {1, 3, 8, 9, 20})
        for (const auto& [d, n, r] : {std::tuple<int64_t, int64_t, int64_t>{16, 4, 2},
                                      {1536, 16, 48},
                                      {200, 16, 128},
                                      {65, 16, 300},
                                      {70, 32, 40},
                                      {33, 21, 7},
                                      {8, 70, 16}})
            for (const bool normed : {false, true}) {
                const Case c{.t = t, .d = d, .n = n, .r = r, .normed = normed};
                expect_like_the_cpu(c, DType::f32, DType::f32);
                expect_like_the_cpu(c, DType::bf16, DType::bf16);
                expect_like_the_cpu(c, DType::f32, DType::bf16);
                expect_like_the_cpu_in_bf16_states(c);
                expect_like_the_cpu(
                    {.t = t, .d = d, .n = n, .r = r, .slots = false, .optional = false, .apart = 1},
                    DType::bf16, DType::bf16);
            }
}

}  // namespace
}  // namespace ssm::test
