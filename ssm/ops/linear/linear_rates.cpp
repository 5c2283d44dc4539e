#include "ssm/ops/linear/linear_rates.h"

#include <algorithm>
#include <chrono>

#include "ssm/ops/linear/linear.h"

namespace ssm {

double measure_matrix_rate(const Exec& ex, DType dtype) {
    using Clock = std::chrono::steady_clock;
    using Seconds = std::chrono::duration<double>;
    constexpr int64_t n = 1024, rows = 512;
    std::vector<float> values(static_cast<size_t>(n * n));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 61) / 61.0f - 0.5f;
    const Tensor all = Tensor::from_floats({n, n}, values).to(dtype);
    const PackedWeight weight(all);
    const Tensor x = all.rows(0, rows), y = Tensor::empty(ex, {rows, n});
    linear(ex, x, weight, {}, y);  // packs the weight
    double best = 0;
    const auto start = Clock::now();
    for (int pass = 0; pass < 5 || Seconds(Clock::now() - start).count() < 0.1; ++pass) {
        const auto before = Clock::now();
        linear(ex, x, weight, {}, y);
        best = std::max(best, 2.0 * rows * n * n / Seconds(Clock::now() - before).count());
    }
    return best;
}

MachineRates measure_machine(const Exec& ex) {
    return {.read_bytes_per_second = measure_read_bandwidth(ex),
            .f32_flop_per_second = measure_matrix_rate(ex, DType::f32),
            .bf16_flop_per_second = measure_matrix_rate(ex, DType::bf16)};
}

}  // namespace ssm
