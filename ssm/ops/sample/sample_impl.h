// Vector kernels of the sampler. Private to ssm/ops/sample.
#pragma once

#include <cstdint>

#include "ssm/core/exec.h"
#include "ssm/core/view.h"
#include "ssm/ops/sample/slot_samplers.h"

namespace ssm::cpu {

// Logits are looked at in blocks of this many: the maximum of a block tells whether it can hold a kept one.
inline constexpr int64_t kLogitBlock = 64;

struct Largest {
    int64_t index;  // the first of the largest; meaningless with has_nan
    float value;
    bool has_nan;
};
Largest largest(const float* x, int64_t n);  // n >= 1

// maxima[i] = the largest of block i. False when there is a NaN.
bool block_maxima(const float* x, int64_t n, float* maxima);

// w = exp((x - max) inv_temperature); 0 where the exponent is below -87.
void exp_weights(const float* x, int64_t n, float max, float inv_temperature, float* w);

// sums[i] = the sum of block i.
void block_sums(const float* w, int64_t n, double* sums);

}  // namespace ssm::cpu

namespace ssm::cuda {

void argmax(const Exec& ex, View<const float, 2> logits, View<int32_t, 1> ids);

// slot_samplers_cuda.cu
struct SampleParams {
    View<const float, 2> logits;  // [b v]
    int64_t valid;
    SlotSamplers::Slot* state;  // [slots]
    View<uint32_t, 2> seen;     // [slots words]
    const int32_t* slots;       // [b] or absent
    View<int32_t, 1> ids;       // [b]
    bool seen_before;
};
void sample(const Exec& ex, const SampleParams& p);
// Sets the bits of `ids` in seen [words].
void mark_seen(const Exec& ex, View<const int32_t, 1> ids, View<uint32_t, 1> seen);

}  // namespace ssm::cuda
