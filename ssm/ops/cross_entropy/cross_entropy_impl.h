// Private: the loops over rows of logits.
#pragma once

#include <cstdint>

#include "ssm/core/exec.h"

namespace ssm::cross_entropy_detail {

// Rows of logits [rows v], dense, with their targets.
struct Rows {
    int64_t rows = 0, v = 0;
    float* logits = nullptr;           // [rows v]
    const int32_t* targets = nullptr;  // [rows]
    float* nll = nullptr;              // [rows]
    const float* grad_nll = nullptr;   // [rows], backward only
};

// nll of each row; the logits stay.
void nll_of_rows(const Exec& ex, const Rows& r) noexcept;
// nll of each row; d (sum grad_nll nll) / d logits replaces the logits.
void nll_and_gradients_of_rows(const Exec& ex, const Rows& r) noexcept;

// Tokens per tile of logits, for `t` tokens: tiles of nearly equal size, at most 32 MiB (or one token).
int64_t tile_rows(int64_t t, int64_t v);

}  // namespace ssm::cross_entropy_detail
