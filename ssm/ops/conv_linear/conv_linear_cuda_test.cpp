// conv_linear on a GPU against the CPU's operators.
#include "ssm/ops/conv_linear/conv_linear.h"

#include <gtest/gtest.h>

#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm::test {
namespace {

struct Case {
    int64_t t, d, o, k = 4;
    bool slots = true, bias = true;
    Activation activation = Activation::silu;
    int64_t apart = 0;
};

struct Operands {
    Tensor x, taps, bias, state, slots, weight, y;

    Operands on(const Exec& ex) const {
        const auto moved = [&](const Tensor& t) { return t ? t.clone().to(ex) : Tensor(); };
        return {moved(x), moved(taps), moved(bias), moved(state), moved(slots), moved(weight), moved(y)};
    }
    void run(const Exec& ex, const Case& c) const {
        conv_linear(ex, x.columns(c.apart, c.apart + c.d),
                    {.weight = taps.view<const float, 2>(),
                     .bias = bias.view_if<const float, 1>(),
                     .activation = c.activation,
                     .state = state,
                     .slots = slots.view_if<const int32_t, 1>()},
                    PackedWeight(weight), y);
    }
};

std::vector<float> floats(const Tensor& t) {
    const Tensor dense = t.clone().to_host().to(DType::f32);
    return {dense.data<float>(), dense.data<float>() + dense.size()};
}

Operands operands(const Case& c, DType type) {
    Random random(static_cast<uint64_t>(c.t + 100 * c.d + c.o));
    const auto drawn = [&](const Shape& shape, DType dtype, float scale = 1.0f) {
        return Tensor::from_floats(shape, random.vector(element_count(shape), -scale, scale)).to(dtype);
    };
    Operands host{.x = drawn({c.t, c.apart + c.d + 8}, type),
                  .taps = drawn({c.d, c.k}, DType::f32),
                  .state = drawn({c.slots ? c.t + 3 : c.t, c.k - 1, c.d}, type),
                  .weight = drawn({c.o, c.d}, type, 0.1f),
                  .y = Tensor::from_floats({c.t, c.o}, nan_vector(c.t * c.o))};
    if (c.bias) host.bias = drawn({c.d}, DType::f32);
    if (c.slots) {
        host.slots = Tensor::empty({c.t}, DType::i32);
        for (int64_t s = 0; s < c.t; ++s) host.slots.data<int32_t>()[s] = static_cast<int32_t>(c.t + 2 - s);
    }
    return host;
}

void expect_like_the_cpu(const Case& c, DType type) {
    SCOPED_TRACE(fmt::format("t {} d {} o {} k {} slots {} bias {} apart {} {}", c.t, c.d, c.o, c.k, c.slots,
                             c.bias, c.apart, name_of(type)));
    const Operands host = operands(c, type), there = host.on(cuda_exec()), here = host.on(make_cpu_exec(1));
    for (int step = 0; step < 2; ++step) {
        here.run(make_cpu_exec(1), c);
        there.run(cuda_exec(), c);
        const double tolerance = type == DType::bf16 ? 1e-2 : 1e-5;
        expect_close(floats(there.y), floats(here.y), tolerance, "y");
        expect_close(floats(there.x), floats(here.x), tolerance, "x");
        expect_close(floats(there.state), floats(here.state), tolerance, "state");
    }
}

TEST(ConvLinearCuda, LikeTheCpu) {
    for (const auto& [d, o] :
         {std::pair<int64_t, int64_t>{1536, 80}, {4096, 160}, {256, 192}, {512, 33}, {512, 200}, {72, 12}})
        for (const int64_t t : {1, 7, 8, 100}) {
            const Case c{.t = t, .d = d, .o = o};
            expect_like_the_cpu(c, DType::bf16);
            if (t < 100) expect_like_the_cpu(c, DType::f32);
        }
}

TEST(ConvLinearCuda, OtherForms) {
    const Case c{.t = 19, .d = 512, .o = 96};
    auto with = [&](auto&& change) {
        Case other = c;
        change(other);
        expect_like_the_cpu(other, DType::bf16);
    };
    with([](Case& o) { o.slots = false; });
    with([](Case& o) { o.bias = false; });
    with([](Case& o) { o.activation = Activation::none; });
    with([](Case& o) { o.k = 3; });
    with([](Case& o) { o.apart = 1; });
    with([](Case& o) { o.apart = 8; });
}

}  // namespace
}  // namespace ssm::test
