// Sampling the next token from logits.
//
// In this order: repetition penalty r over the tokens already seen (logit > 0: / r, else * r; Keskar et al.
// 2019), then greedy if temperature = 0; else softmax(logits / temperature) restricted by top_k (the k
// largest), top_p (the smallest set of largest probabilities that reaches p; Holtzman et al. 2020) and min_p
// (at least min_p times the largest; Nguyen et al. 2024), renormalised, and one draw. Ties go to the smaller
// id.
//
// Random numbers: a counter-based generator (splitmix64 of seed and draw number), so a Sampler is two
// integers and a saved state continues the same way.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace ssm {

struct SamplerOptions {
    float temperature = 1.0f;         // >= 0; 0 is greedy
    int32_t top_k = 0;                // 0: off
    float top_p = 1.0f;               // (0, 1]; 1: off
    float min_p = 0.0f;               // [0, 1); 0: off
    float repetition_penalty = 1.0f;  // > 0; 1: off
    uint64_t seed = 0;
};

class Sampler {
public:
    // Throws Error(invalid_argument) for options out of range.
    explicit Sampler(SamplerOptions options);

    // The next id in [0, valid): logits beyond `valid` (vocabulary padding) are never chosen. `history`: ids
    // for the repetition penalty. Throws Error(numeric) when a logit is NaN or all are -inf.
    int32_t sample(std::span<const float> logits, int64_t valid, std::span<const int32_t> history);

    uint64_t draws() const { return draws_; }
    void set_draws(uint64_t draws) { draws_ = draws; }

private:
    SamplerOptions options_;
    uint64_t draws_ = 0;
    std::vector<float> logits_;
    std::vector<int32_t> order_;
};

// The first index of the largest value. Throws Error(numeric) when a logit is NaN.
int32_t argmax(std::span<const float> logits);

}  // namespace ssm
