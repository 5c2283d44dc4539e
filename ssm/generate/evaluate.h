// Mean negative log-likelihood of a text under a model.
#pragma once

#include <functional>
#include <span>

#include "ssm/models/language_model.h"

namespace ssm {

struct EvaluateOptions {
    int64_t window = 512;         // predicted tokens in a row
    bool carry_state = false;     // continue from the state of the window before, instead of from zero
    int64_t batch_tokens = 2048;  // windows that are independent run together, up to this many tokens
};

struct Evaluation {
    int64_t tokens = 0;  // predicted: one less than given
    double nll = 0;      // sum, in nats
    double seconds = 0;
    double mean_nll() const { return nll / static_cast<double>(tokens); }
};

// Predicts ids[1], ids[2], ... from what stands before, in consecutive windows. Memory is constant in the
// number of ids. `progress` is called after each piece with what there is so far. With `carry_state` the
// first pieces are read once before the clock starts, so that `seconds` grows with the tokens alone. Throws
// Error(numeric) at the first NaN.
Evaluation evaluate(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids,
                    const EvaluateOptions& options,
                    const std::function<void(const Evaluation&)>& progress = {});

}  // namespace ssm
