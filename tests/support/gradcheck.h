// Gradients against central differences.
#pragma once

#include <functional>
#include <vector>

#include "tests/support/compare.h"

namespace ssm::test {

// d loss / d x by central differences. `loss` is the f64 reference of the operator, reading x: in f64 a step
// of 1e-5 leaves about ten digits.
inline std::vector<double> finite_differences(std::vector<double>& x, const std::function<double()>& loss,
                                              double step = 1e-5) {
    std::vector<double> gradient(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        const double keep = x[i];
        x[i] = keep + step;
        const double up = loss();
        x[i] = keep - step;
        const double down = loss();
        x[i] = keep;
        gradient[i] = (up - down) / (2 * step);
    }
    return gradient;
}

// Buffers of gradients start at this value, since every *_backward adds; subtract it before comparing.
inline constexpr float kGradientStart = 0.5f;

inline std::vector<float> added(std::vector<float> gradient) {
    for (float& g : gradient) g -= kGradientStart;
    return gradient;
}

}  // namespace ssm::test
