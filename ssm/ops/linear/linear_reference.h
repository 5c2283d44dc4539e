// The product of two matrices by definition, in f64, and the types that the tests of linear go through.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ssm/core/dtype.h"

namespace ssm::test {

struct LinearTypes {
    DType x, weight, y;
};
inline constexpr LinearTypes kLinearTypes[] = {
    {DType::f32, DType::f32, DType::f32},    {DType::bf16, DType::bf16, DType::f32},
    {DType::bf16, DType::bf16, DType::bf16}, {DType::f32, DType::bf16, DType::f32},
    {DType::f32, DType::bf16, DType::bf16},  {DType::bf16, DType::f32, DType::f32},
    {DType::bf16, DType::f32, DType::bf16},
};
inline std::string name_of(const LinearTypes& types) {
    return fmt::format("{}_{}_{}", ssm::name_of(types.x), ssm::name_of(types.weight), ssm::name_of(types.y));
}

// Element (i, j) of a dense matrix of so many columns, as it lies or transposed.
struct MatrixValues {
    const std::vector<float>& values;
    int64_t columns;
    bool transposed = false;

    double operator()(int64_t i, int64_t j) const {
        return static_cast<double>(
            values[static_cast<size_t>(transposed ? j * columns + i : i * columns + j)]);
    }
};

// [m n]: start + sum_k a(i, k) b(k, j), the factors rounded to bf16 if asked.
inline std::vector<double> reference_product(int64_t m, int64_t n, int64_t k, const MatrixValues& a,
                                             const MatrixValues& b, bool round = false, double start = 0) {
    const auto factor = [round](double x) {
        return round ? static_cast<double>(static_cast<float>(bf16(static_cast<float>(x)))) : x;
    };
    std::vector<double> c(static_cast<size_t>(m * n), start);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
            for (int64_t l = 0; l < k; ++l)
                c[static_cast<size_t>(i * n + j)] += factor(a(i, l)) * factor(b(l, j));
    return c;
}

// [t o]: x [t i] times the transpose of weight [o i], plus a bias that may be empty.
inline std::vector<double> reference_linear(const std::vector<float>& x, const std::vector<float>& weight,
                                            const std::vector<float>& bias, int64_t t, int64_t i, int64_t o,
                                            bool round) {
    auto y = reference_product(t, o, i, {x, i}, {weight, i, true}, round);
    for (size_t e = 0; !bias.empty() && e < y.size(); ++e)
        y[e] += static_cast<double>(bias[e % static_cast<size_t>(o)]);
    return y;
}

}  // namespace ssm::test
