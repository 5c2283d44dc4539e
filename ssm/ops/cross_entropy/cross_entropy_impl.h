// Private: the loops over rows of logits on the CPU, the whole on a GPU.
#pragma once

#include <cstdint>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/core/view.h"
#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/linear/linear.h"

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

// Arguments are checked, but for targets: those are in device memory.
namespace ssm::cuda {

// f32 logits of one tile; their gradients take the same memory. Large: the weight's gradient is read and
// written once for each tile. (At 16384 tokens of 50288: 6 tiles of 2816.)
inline constexpr int64_t kTileBytes = int64_t{544} << 20;

void linear_cross_entropy(const Exec& ex, const Tensor& hidden, const PackedWeight& weight,
                          View<const int32_t, 1> targets, View<float, 1> nll,
                          int64_t tile_bytes = kTileBytes);

struct LinearCrossEntropyBackward {
    Tensor hidden, weight;
    View<const int32_t, 1> targets;
    View<const float, 1> grad_nll;
    View<float, 1> nll;
    Tensor grad_hidden;
    View<float, 2> grad_weight;
    LinearCrossEntropySet set = {};
};
void linear_cross_entropy_backward(const Exec& ex, const LinearCrossEntropyBackward& call,
                                   int64_t tile_bytes = kTileBytes);
void mean_nll(const Exec& ex, View<const float, 1> nll, double counted, float* mean);

}  // namespace ssm::cuda
