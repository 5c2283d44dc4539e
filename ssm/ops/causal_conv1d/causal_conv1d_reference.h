// The causal convolution by definition, in f64, for its test and its benchmark. Rows are dense.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace ssm::test {

struct ConvReference {
    int64_t d = 0, k = 0;
    std::vector<int64_t> cu_seqlens;
    std::vector<double> x, weight, bias, initial_state;  // the last two may be empty
    bool silu = true;
    std::vector<double> y, final_state;  // results of run()

    // Input c at position p of sequence s; before the start, of the initial state.
    double input(int64_t s, int64_t p, int64_t c) const {
        if (p >= 0) return x[(cu_seqlens[s] + p) * d + c];
        return initial_state.empty() ? 0.0 : initial_state[(s * (k - 1) + k - 1 + p) * d + c];
    }
    void run() {
        y.assign(x.size(), 0.0);
        final_state.clear();
        for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) sequence(static_cast<int64_t>(s));
    }

private:
    void sequence(int64_t s) {
        const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
        for (int64_t p = 0; p < length; ++p) {
            for (int64_t c = 0; c < d; ++c) {
                double sum = bias.empty() ? 0.0 : bias[c];
                for (int64_t j = 0; j < k; ++j) sum += weight[c * k + j] * input(s, p - k + 1 + j, c);
                y[(cu_seqlens[s] + p) * d + c] = silu ? sum / (1 + std::exp(-sum)) : sum;
            }
        }
        for (int64_t i = 0; i < k - 1; ++i) {
            for (int64_t c = 0; c < d; ++c) final_state.push_back(input(s, length - k + 1 + i, c));
        }
    }
};

}  // namespace ssm::test
