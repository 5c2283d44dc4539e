// Comparing results in tests: first the pattern of NaN and Inf, then the relative L2 error.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "ssm/core/dtype.h"
#include "ssm/core/view.h"

namespace ssm::test {

// ||a - b|| / ||b|| in f64; infinite when NaN or Inf stand at different places.
template <class A, class B>
double relative_l2(const std::vector<A>& actual, const std::vector<B>& expected) {
    if (actual.size() != expected.size()) return INFINITY;
    double difference = 0, norm = 0;
    for (size_t i = 0; i < actual.size(); ++i) {
        const double a = static_cast<double>(static_cast<float>(actual[i])),
                     b = static_cast<double>(expected[i]);
        if (std::isnan(a) != std::isnan(b) || std::isinf(a) != std::isinf(b)) return INFINITY;
        if (!std::isfinite(b)) continue;
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

template <class A, class B>
void expect_close(const std::vector<A>& actual, const std::vector<B>& expected, double tolerance,
                  const char* what) {
    EXPECT_LE(relative_l2(actual, expected), tolerance) << what;
}

// Reproducible uniform numbers.
class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    float uniform(float low, float high) {
        return low + (high - low) * static_cast<float>(engine_() >> 40) * 0x1p-24f;
    }
    int64_t integer(int64_t low, int64_t high) {  // inclusive
        return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
    }
    template <class T = float>
    std::vector<T> vector(int64_t count, float low = -1.0f, float high = 1.0f) {
        std::vector<T> v(static_cast<size_t>(count));
        for (T& x : v) x = static_cast<T>(uniform(low, high));
        return v;
    }

private:
    std::mt19937_64 engine_;
};

// Outputs start as NaN: what a kernel forgets to write is seen.
template <class T = float>
std::vector<T> nan_vector(int64_t count) {
    return std::vector<T>(static_cast<size_t>(count), static_cast<T>(NAN));
}

template <class T>
std::vector<double> to_double(const std::vector<T>& v) {
    std::vector<double> d;
    d.reserve(v.size());
    for (const T& x : v) d.push_back(static_cast<double>(static_cast<float>(x)));
    return d;
}

// What a bf16 kernel really sees: the values after rounding.
inline std::vector<bf16> to_bf16(const std::vector<float>& v) {
    std::vector<bf16> r;
    r.reserve(v.size());
    for (float x : v) r.push_back(static_cast<bf16>(x));
    return r;
}

}  // namespace ssm::test
