// The products on a GPU against f64 loops: every combination of types, few rows and many, strided and
// misaligned rows, gradients that add and that are written, f32 and bf16 arithmetic.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/core/cuda/context.h"
#include "ssm/ops/linear/linear.h"
#include "ssm/ops/linear/linear_reference.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using namespace test;

// A matrix on the GPU inside a wider one of NaN, which must stay: `before` columns on its left, `after` on
// its right. Odd numbers of them misalign the rows.
struct There {
    Tensor wide, tensor;
    int64_t rows, columns, before, after;
    std::vector<float> values;  // as stored

    There(int64_t r, int64_t c, DType dtype, const std::vector<float>& v, int64_t left, int64_t right)
        : rows(r), columns(c), before(left), after(right), values(v) {
        const int64_t width = before + columns + after;
        std::vector<float> all(static_cast<size_t>(rows * width), NAN);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                all[static_cast<size_t>(i * width + before + j)] = v[static_cast<size_t>(i * columns + j)];
        if (dtype == DType::bf16) {
            for (float& x : values) x = static_cast<float>(bf16(x));
            wide = on_device(to_bf16(all), {rows, width});
        } else {
            wide = on_device(all, {rows, width});
        }
        tensor = wide.columns(before, before + columns);
    }
    // What is there now; NaN where something between the rows was written.
    std::vector<float> now() const {
        const int64_t width = before + columns + after;
        std::vector<float> all;
        if (wide.dtype() == DType::bf16) {
            for (const bf16 x : from_device<bf16>(wide)) all.push_back(static_cast<float>(x));
        } else {
            all = from_device<float>(wide);
        }
        std::vector<float> result;
        bool clean = true;
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < width; ++j) {
                const float x = all[static_cast<size_t>(i * width + j)];
                if (j >= before && j < before + columns)
                    result.push_back(x);
                else
                    clean = clean && std::isnan(x);
            }
        }
        if (!clean) std::fill(result.begin(), result.end(), NAN);
        return result;
    }
    View<float, 2> view() const { return tensor.view<float, 2>(); }
};

class LinearCudaTypes : public testing::TestWithParam<LinearTypes> {};
INSTANTIATE_TEST_SUITE_P(All, LinearCudaTypes, testing::ValuesIn(kLinearTypes),
                         [](const auto& types) { return name_of(types.param); });

void check(const LinearTypes& types, int64_t t, int64_t i, int64_t o, int64_t left, int64_t right,
           bool with_bias, MatmulPrecision precision) {
    SCOPED_TRACE(testing::Message() << "t " << t << " i " << i << " o " << o << " left " << left << " right "
                                    << right << " bias " << with_bias << " bf16 "
                                    << (precision == MatmulPrecision::bf16));
    Exec ex = cuda_exec();
    ex.matmul = precision;
    Random random(static_cast<uint64_t>(t + 10 * i + 100 * o));
    const There x(t, i, types.x, random.vector(t * i), left, right);
    const There w(o, i, types.weight, random.vector(o * i), 0, 0);
    const std::vector<float> bias = random.vector(o);
    const Tensor bias_there = on_device(bias, {o});
    const View<const float, 1> b = with_bias ? bias_there.view<const float, 1>() : View<const float, 1>();
    const bool many = t > 8;
    const double tolerance = types.y == DType::bf16 ? 5e-3 : 2e-6;
    for (const bool packed : {false, true}) {
        const bool round =
            types.weight == DType::bf16 || (many && !packed && precision == MatmulPrecision::bf16);
        const auto want =
            reference_linear(x.values, w.values, with_bias ? bias : std::vector<float>(), t, i, o, round);
        const There y(t, o, types.y, nan_vector(t * o), right, left);
        if (packed)
            linear(ex, x.tensor, PackedWeight(w.tensor), b, y.tensor);
        else
            linear(ex, x.tensor, w.tensor, b, y.tensor);
        EXPECT_LE(relative_l2(y.now(), want), tolerance) << (packed ? "packed" : "plain");
    }
}

TEST_P(LinearCudaTypes, MatchesReference) {
    const int64_t sizes[][2] = {{1, 1}, {3, 5}, {8, 16}, {48, 7}, {33, 21}, {257, 130}, {768, 300}};  // i, o
    for (const auto [i, o] : sizes) {
        for (const int64_t t : {0, 1, 2, 3, 4, 5, 7, 8, 9, 33, 128, 130}) {
            check(GetParam(), t, i, o, 0, 0, t % 2 == 1, MatmulPrecision::f32);
            check(GetParam(), t, i, o, 1, 2, t % 2 == 0, MatmulPrecision::f32);
            check(GetParam(), t, i, o, 8, 0, true, MatmulPrecision::bf16);
        }
    }
}

// Sizes at which other shapes of the kernel for few rows are taken.
TEST_P(LinearCudaTypes, FewRowsOfManyOutputs) {
    for (const int64_t t : {1, 2, 3, 6, 8}) {
        check(GetParam(), t, 136, 132 * 33, 0, 0, true, MatmulPrecision::f32);
        check(GetParam(), t, 136, 132 * 129 + 1, 0, 8, false, MatmulPrecision::f32);
        check(GetParam(), t, 1536, 80, 0, 0, false, MatmulPrecision::f32);
        check(GetParam(), t, 2120, 131, 0, 0, true, MatmulPrecision::f32);
        check(GetParam(), t, 48, 1536, 0, 32, false, MatmulPrecision::f32);
    }
}

struct BackwardTypes {
    DType grad_y, x, weight;
    MatmulPrecision precision;
};

void check_backward(int64_t t, int64_t i, int64_t o, int64_t left, int64_t right, const BackwardTypes& types,
                    LinearBackwardSet set) {
    SCOPED_TRACE(testing::Message() << "t " << t << " i " << i << " o " << o << " left " << left << " grad_y "
                                    << name_of(types.grad_y) << " x " << name_of(types.x) << " weight "
                                    << name_of(types.weight) << " bf16 "
                                    << (types.precision == MatmulPrecision::bf16));
    Exec ex = cuda_exec();
    ex.matmul = types.precision;
    const bool round = types.precision == MatmulPrecision::bf16 || types.weight == DType::bf16;
    Random random(static_cast<uint64_t>(t + 10 * i + 100 * o));
    const auto started = [](int64_t count, bool write) {
        return write ? nan_vector(count) : std::vector<float>(static_cast<size_t>(count), kGradientStart);
    };
    const There g(t, o, types.grad_y, random.vector(t * o), left, right);
    const There x(t, i, types.x, random.vector(t * i), right, left);
    const There w(o, i, types.weight, random.vector(o * i), left, right);
    const There grad_x(t, i, types.x, started(t * i, set.x), right, right);
    const There grad_w(o, i, DType::f32, started(o * i, set.weight), left, left);
    const Tensor grad_b = on_device(started(o, false), {o});
    linear_backward(ex, g.tensor, x.tensor, w.tensor, grad_x.tensor, grad_w.view(), grad_b.view<float, 1>(),
                    set);
    const double start = static_cast<double>(kGradientStart);
    expect_close(grad_x.now(),
                 reference_product(t, i, o, {g.values, o}, {w.values, i}, round, set.x ? 0.0 : start),
                 types.x == DType::bf16 ? 5e-3 : 3e-6, "grad_x");
    expect_close(
        grad_w.now(),
        reference_product(o, i, t, {g.values, o, true}, {x.values, i}, round, set.weight ? 0.0 : start), 3e-6,
        "grad_weight");
    const std::vector<float> ones(static_cast<size_t>(t), 1.0f);
    expect_close(from_device<float>(grad_b),
                 reference_product(1, o, t, {ones, t}, {g.values, o}, false, start), 3e-6, "grad_bias");
}

TEST(LinearCuda, GradientsMatchReference) {
    std::vector<BackwardTypes> all;
    for (const DType g : {DType::f32, DType::bf16})
        for (const DType x : {DType::f32, DType::bf16})
            for (const DType w : {DType::f32, DType::bf16})
                for (const auto precision : {MatmulPrecision::f32, MatmulPrecision::bf16})
                    all.push_back({g, x, w, precision});
    for (const auto [i, o] :
         std::vector<std::array<int64_t, 2>>{{1, 1}, {3, 5}, {48, 7}, {33, 21}, {256, 130}}) {
        for (const int64_t t : {0, 1, 2, 9, 127, 128, 300}) {
            for (const BackwardTypes& types : all) {
                if (i * t > 256 * 9 && types.x != types.grad_y) continue;  // the references take long
                check_backward(t, i, o, 0, 0, types, {});
                check_backward(t, i, o, 1, 2, types, {.x = true});
                check_backward(t, i, o, 8, 0, types, {.weight = true});
            }
        }
    }
    check_backward(9000, 40, 72, 0, 0, {DType::f32, DType::f32, DType::f32, MatmulPrecision::f32}, {});
    check_backward(9000, 40, 72, 0, 8, {DType::bf16, DType::bf16, DType::bf16, MatmulPrecision::f32}, {});
}

// All in bf16 and in aligned rows: nothing is copied.
TEST(LinearCuda, Bf16GradientsNeedNoScratch) {
    Exec ex = cuda_exec();
    ex.allocator = std::make_shared<cuda::DeviceAllocator>(ex.cuda);  // counts what the call takes
    const auto bf16_matrix = [](int64_t r, int64_t c) {
        return There(r, c, DType::bf16, Random(1).vector(r * c), 8, 16);
    };
    const There g = bf16_matrix(256, 72), x = bf16_matrix(256, 40), w = bf16_matrix(72, 40),
                grad_x = bf16_matrix(256, 40);
    const There grad_w(72, 40, DType::f32, Random(2).vector(72 * 40), 0, 0);
    linear_backward(ex, g.tensor, x.tensor, w.tensor, grad_x.tensor, grad_w.view(), {});
    synchronize(ex);
    EXPECT_EQ(ex.allocator->peak_bytes(), 0u);
}

TEST(LinearCuda, AbsentGradientsAreNotTouched) {
    Exec ex = cuda_exec();
    const There g(4, 3, DType::f32, Random(1).vector(12), 0, 0),
        x(4, 2, DType::f32, Random(2).vector(8), 0, 0), w(3, 2, DType::f32, Random(3).vector(6), 0, 0),
        grad(3, 2, DType::f32, std::vector<float>(6, kGradientStart), 0, 0);
    linear_backward(ex, g.tensor, x.tensor, w.tensor, {}, {}, {});
    linear_backward(ex, g.tensor, x.tensor, w.tensor, {}, grad.view(), {});
    expect_close(grad.now(),
                 reference_product(3, 2, 4, {g.values, 3, true}, {x.values, 2}, false,
                                   static_cast<double>(kGradientStart)),
                 1e-6, "grad_weight");
}

TEST(LinearCuda, MatmulMatchesReference) {
    const Exec& ex = cuda_exec();
    for (const auto [m, n, k] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {5, 3, 0}, {0, 3, 2}, {3, 0, 2}, {7, 9, 31}, {64, 64, 64}, {65, 33, 130}}) {
        for (int variant = 0; variant < 8; ++variant) {
            SCOPED_TRACE(testing::Message()
                         << "m " << m << " n " << n << " k " << k << " variant " << variant);
            const MatmulOptions options{.transpose_a = (variant & 1) != 0,
                                        .transpose_b = (variant & 2) != 0,
                                        .alpha = 0.75f,
                                        .beta = (variant & 4) != 0 ? -2.0f : 0.0f};
            Random random(7);
            const int64_t gap = variant % 3;
            const There a(options.transpose_a ? k : m, options.transpose_a ? m : k, DType::f32,
                          random.vector(m * k), gap, 1);
            const There b(options.transpose_b ? n : k, options.transpose_b ? k : n, DType::f32,
                          random.vector(n * k), 0, gap);
            const There c(m, n, DType::f32,
                          options.beta == 0.0f
                              ? nan_vector(m * n)
                              : std::vector<float>(static_cast<size_t>(m * n), kGradientStart),
                          gap, gap);
            matmul(ex, a.view(), b.view(), c.view(), options);
            auto want = reference_product(m, n, k, {a.values, a.columns, options.transpose_a},
                                          {b.values, b.columns, options.transpose_b});
            for (double& x : want) x = 0.75 * x + static_cast<double>(options.beta * kGradientStart);
            expect_close(c.now(), want, 2e-6, "c");
        }
    }
}

TEST(LinearCuda, SameBytesFromRunToRun) {
    Exec ex = cuda_exec();
    const int64_t t = 2000, i = 96, o = 48;
    const There g(t, o, DType::f32, Random(1).vector(t * o), 0, 0),
        x(t, i, DType::f32, Random(2).vector(t * i), 0, 0),
        w(o, i, DType::f32, Random(3).vector(o * i), 0, 0);
    for (const auto precision : {MatmulPrecision::f32, MatmulPrecision::bf16}) {
        ex.matmul = precision;
        std::vector<float> first;
        for (int run = 0; run < 5; ++run) {
            const There grad_w(o, i, DType::f32, nan_vector(o * i), 0, 0);
            const Tensor grad_b = on_device(std::vector<float>(static_cast<size_t>(o)), {o});
            linear_backward(ex, g.tensor, x.tensor, w.tensor, {}, grad_w.view(), grad_b.view<float, 1>(),
                            {.weight = true});
            auto all = grad_w.now();
            const auto bias = from_device<float>(grad_b);
            all.insert(all.end(), bias.begin(), bias.end());
            if (run == 0) first = all;
            EXPECT_EQ(all, first);
        }
    }
}

}  // namespace
}  // namespace ssm
