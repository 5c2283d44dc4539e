// Learning rate: linear warm-up, then half a cosine down to a floor.
//
//   rate(s) = peak * s / warmup                                              s <= warmup
//   rate(s) = floor + (peak - floor) (1 + cos(pi (p - w) / (1 - w))) / 2     else
//
// s counts steps from 1; p in [0, 1] is the share of the run that is done, w its value at the end of warm-up.
// Source     Loshchilov & Hutter 2017 (SGDR, one cycle).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace ssm {

struct Schedule {
    double peak = 1e-3, floor = 1e-5;
    int64_t warmup = 0;
};

inline double learning_rate(const Schedule& s, int64_t step, double progress, double warmup_progress) {
    if (step <= s.warmup) return s.peak * static_cast<double>(step) / static_cast<double>(s.warmup);
    const double rest = 1.0 - warmup_progress;
    const double t = rest > 0 ? std::clamp((progress - warmup_progress) / rest, 0.0, 1.0) : 1.0;
    return s.floor + (s.peak - s.floor) * 0.5 * (1.0 + std::cos(std::numbers::pi * t));
}

}  // namespace ssm
