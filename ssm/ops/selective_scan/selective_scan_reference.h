// The selective scan by definition, in f64, for its test and its benchmark: one loop per index, no code in
// common with the kernels. Rows are dense.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace ssm::test {

struct ScanReference {
    int64_t d = 0, n = 0;
    std::vector<int64_t> cu_seqlens;
    std::vector<double> u, delta, A, B, C;
    std::vector<double> D, z, delta_bias, initial_state;  // may be empty
    bool delta_softplus = true;
    std::vector<double> y, final_state;  // results of run()

    void run() {
        const auto s = static_cast<int64_t>(cu_seqlens.size()) - 1;
        y.assign(u.size(), 0.0);
        final_state.assign(static_cast<size_t>(s * d * n), 0.0);
        for (int64_t i = 0; i < s; ++i) {
            for (int64_t c = 0; c < d; ++c) channel(i, c);
        }
    }

private:
    void channel(int64_t i, int64_t c) {
        std::vector<double> h(static_cast<size_t>(n), 0.0);
        for (int64_t j = 0; j < n && !initial_state.empty(); ++j) h[j] = initial_state[(i * d + c) * n + j];
        for (int64_t t = cu_seqlens[i]; t < cu_seqlens[i + 1]; ++t) {
            double dt = delta[t * d + c] + (delta_bias.empty() ? 0.0 : delta_bias[c]);
            if (delta_softplus) dt = dt > 30 ? dt : std::log1p(std::exp(dt));
            double out = D.empty() ? 0.0 : D[c] * u[t * d + c];
            for (int64_t j = 0; j < n; ++j) {
                h[j] = std::exp(dt * A[c * n + j]) * h[j] + dt * B[t * n + j] * u[t * d + c];
                out += C[t * n + j] * h[j];
            }
            const double gate = z.empty() ? 1.0 : z[t * d + c] / (1 + std::exp(-z[t * d + c]));
            y[t * d + c] = out * gate;
        }
        for (int64_t j = 0; j < n; ++j) final_state[(i * d + c) * n + j] = h[j];
    }
};

}  // namespace ssm::test
