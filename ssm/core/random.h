// Reproducible random numbers: splitmix64 (Steele, Lea & Flood 2014). The same seed gives the same numbers on
// every machine; the state is one integer, so it can be saved.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace ssm {

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    // [0, 1) with 53 bits.
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    double uniform(double low, double high) { return low + (high - low) * uniform(); }
    // Mean 0, variance 1 (Box & Muller 1958).
    double normal() {
        const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
        return radius * std::cos(2.0 * std::numbers::pi * uniform());
    }

private:
    uint64_t state_;
};

}  // namespace ssm
