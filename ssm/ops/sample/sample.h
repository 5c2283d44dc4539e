// Sampling the next token from logits.
//
// In this order: repetition penalty r over the tokens already seen (logit > 0: / r, else * r, once for each
// token; Keskar et al. 2019), then greedy if temperature = 0; else softmax(logits / temperature) restricted
// by top_k (the k largest), top_p (of what is left and renormalised, the smallest set of largest
// probabilities that reaches p; Holtzman et al. 2020) and min_p (at least min_p times the largest; Nguyen et
// al. 2024), renormalised, and one draw. Ties go to the smaller id.
//
// The draw     u in [0, 1) picks the first id, in rising order, at which the cumulative probability
//              exceeds u.
// Random       splitmix64: draw number i of a seed is its output number i, so a Sampler is two integers
//              and a saved state continues the same way. Greedy choices draw nothing.
// Numerics     weights in f32 (rel. error 2e-6 where they matter), sums in f64; logits more than 87
//              temperatures below the largest have probability 0.
// Cost         4 bytes per logit read once for greedy, 16 without restriction; with top_k or top_p only the
//              blocks of 64 logits that can hold a kept one are looked at again: nothing sorts the
//              vocabulary.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

struct SamplerOptions {
    float temperature = 1.0f;         // >= 0; 0 is greedy
    int32_t top_k = 0;                // 0: off
    float top_p = 1.0f;               // (0, 1]; 1: off
    float min_p = 0.0f;               // [0, 1); 0: off
    float repetition_penalty = 1.0f;  // > 0; 1: off
    uint64_t seed = 0;

    bool operator==(const SamplerOptions&) const = default;
};

class Sampler {
public:
    // Throws Error(invalid_argument) for options out of range.
    explicit Sampler(SamplerOptions options);

    // The next id in [0, valid): logits beyond `valid` (vocabulary padding) are never chosen. `history`: ids
    // for the repetition penalty, in [0, valid). Throws Error(numeric) when a logit is NaN or +inf or all are
    // -inf, Error(invalid_argument) when an id or `valid` is out of range.
    int32_t sample(std::span<const float> logits, int64_t valid, std::span<const int32_t> history);

    const SamplerOptions& options() const { return options_; }
    uint64_t draws() const { return draws_; }
    void set_draws(uint64_t draws) { draws_ = draws; }

private:
    struct Candidate {
        float logit, weight;
        int32_t id;
    };
    std::span<const float> penalised(std::span<const float> logits, std::span<const int32_t> history);
    int32_t draw_any(std::span<const float> logits, float max, double u);
    int32_t draw_kept(std::span<const float> logits, float max, double u);
    void keep_top_k(std::span<const float> logits, float max);
    double keep_heavy(std::span<const float> logits, float max);
    template <class Measure>
    void keep_prefix(double target, float max, Measure measure);

    SamplerOptions options_;
    uint64_t draws_ = 0;
    // Scratch, kept between calls.
    std::vector<float> logits_, weights_, maxima_, scratch_;
    std::vector<double> sums_;
    std::vector<Candidate> candidates_, edge_;
};

// The first index of the largest value. Throws Error(numeric) when a logit is NaN, Error(invalid_argument)
// when there is none.
int32_t argmax(std::span<const float> logits);

// The same for every row of logits [b v], where the logits are (ids [b] too): on a GPU nothing waits and
// nothing is copied to the host. Columns of padding: pass fewer columns. A row with a NaN throws; on a GPU
// its id is -1.
void argmax(const Exec& ex, View<const float, 2> logits, View<int32_t, 1> ids);

}  // namespace ssm
