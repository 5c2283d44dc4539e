#include "ssm/ops/linear/linear_rates.h"

#include <algorithm>
#include <chrono>

#include "ssm/ops/linear/linear.h"

namespace ssm {

double measure_matrix_rate(const Exec& ex, DType dtype) {
    using Clock = std::chrono::steady_clock;
    using Seconds = std::chrono::duration<double>;
    const bool gpu = ex.device != Device::cpu;
    const int64_t n = gpu ? 8192 : 1024, rows = gpu ? 8192 : 512;
    const auto flop = 2.0 * static_cast<double>(rows * n * n);
    std::vector<float> values(static_cast<size_t>(n * n));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 61) / 61.0f - 0.5f;
    const Tensor all = Tensor::from_floats({n, n}, values).to(dtype).to(ex);
    const PackedWeight weight(all);
    const Tensor x = all.rows(0, rows), y = Tensor::empty(ex, {rows, n});
    linear(ex, x, weight, {}, y);  // packs the weight
    synchronize(ex);
    double best = 0;
    const auto start = Clock::now();
    for (int pass = 0; pass < 5 || Seconds(Clock::now() - start).count() < 0.1; ++pass) {
        const auto before = Clock::now();
        linear(ex, x, weight, {}, y);
        synchronize(ex);
        best = std::max(best, flop / Seconds(Clock::now() - before).count());
    }
    return best;
}

double measure_copy_bandwidth(const Exec& ex) {
    using Clock = std::chrono::steady_clock;
    constexpr int64_t kBytes = int64_t{512} << 20;
    constexpr int kCopies = 4;
    const Tensor from = Tensor::zeros(ex, {kBytes}, DType::u8), to = Tensor::zeros(ex, {kBytes}, DType::u8);
    double best = 0;
    for (int pass = 0; pass < 5; ++pass) {
        synchronize(ex);
        const auto before = Clock::now();
        for (int i = 0; i < kCopies; ++i) to.copy_from(from);
        synchronize(ex);
        const double seconds = std::chrono::duration<double>(Clock::now() - before).count();
        best = std::max(best, 2.0 * kCopies * static_cast<double>(kBytes) / seconds);
    }
    return best;
}

MachineRates measure_machine(const Exec& ex) {
    return {.read_bytes_per_second = measure_read_bandwidth(ex),
            .f32_flop_per_second = measure_matrix_rate(ex, DType::f32),
            .bf16_flop_per_second = measure_matrix_rate(ex, DType::bf16)};
}

}  // namespace ssm
