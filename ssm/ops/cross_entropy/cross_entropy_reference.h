// The loss of one token by definition, in f64, for tests and benchmarks.
//
//   logits[j] = sum_k hidden[k] weight[j, k],   nll = log sum_j exp(logits[j]) - logits[target]
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace ssm::test {

struct TokenLoss {
    std::vector<double> logits;
    double log_sum = 0;

    // hidden: [e]   weight: [v e]
    template <class T>
    TokenLoss(const T* hidden, const T* weight, int64_t v, int64_t e) : logits(static_cast<size_t>(v), 0.0) {
        for (double& logit : logits)
            for (int64_t k = 0; k < e; ++k)
                logit += static_cast<double>(hidden[k]) * static_cast<double>(*weight++);
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (const double x : logits) sum += std::exp(x - most);
        log_sum = most + std::log(sum);
    }
    double nll(int32_t target) const { return log_sum - logits[static_cast<size_t>(target)]; }
    // d nll / d logits[j]
    double gradient(int64_t j, int32_t target) const {
        return std::exp(logits[static_cast<size_t>(j)] - log_sum) - (j == target ? 1.0 : 0.0);
    }
};

}  // namespace ssm::test
