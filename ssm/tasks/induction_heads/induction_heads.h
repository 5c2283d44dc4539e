// Induction heads: the token that followed the prefix the first time must follow it the second time.
//
//   ids      n n n P a n n ... n P        n, a: ordinary tokens 0..14, uniform; P = 15, the prefix
//   targets  - - - - - - - ... - a        the last position alone counts
//
// The first P stands at a uniform place in [0, length - 3].
// Source     Gu & Dao 2023 (Mamba), section 3.1 and appendix E.1, after Dao et al. 2023 (H3).
#pragma once

#include "ssm/tasks/task.h"

namespace ssm::induction_heads {

constexpr int64_t kVocab = 16, kOrdinary = kVocab - 1;
constexpr int32_t kPrefix = 15;

Task task();

// Where the first prefix of a sequence stands.
int64_t prefix_position(uint64_t key, int64_t length);

}  // namespace ssm::induction_heads
