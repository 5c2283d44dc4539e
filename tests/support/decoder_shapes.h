// Small models that take every path of a step: both architectures, odd and packed sizes, biases, norms.
#pragma once

#include <vector>

#include "tests/support/reference_model.h"

namespace ssm::test {

inline std::vector<ReferenceShape> decoder_shapes() {
    constexpr auto kMamba2 = ReferenceShape::Kind::mamba2;
    constexpr const char* kOriginal = "backbone.embedding.weight";
    return {
        {},
        {.vocab = 50, .e = 33, .layers = 1, .d = 66, .n = 16, .projection_bias = true, .r = 3},
        {.vocab = 64, .e = 32, .d = 64, .n = 16, .k = 3, .tied = false, .conv_bias = false, .r = 8},
        {.e = 8, .d = 16, .n = 20, .bcdt_eps = 1e-4},
        {.vocab = 96, .e = 64, .d = 128, .n = 16, .r = 8, .bcdt_eps = 1e-4},
        {.kind = kMamba2},
        mamba2_with_groups(),
        {.kind = kMamba2, .vocab = 64, .e = 64, .d = 128, .n = 128, .h = 2, .p = 64},
        {.kind = kMamba2,
         .vocab = 64,
         .e = 32,
         .d = 64,
         .n = 16,
         .h = 4,
         .p = 16,
         .dt_min = 0.1,
         .dt_max = 0.9},
        {.kind = kMamba2,
         .e = 12,
         .d = 24,
         .n = 8,
         .h = 4,
         .p = 6,
         .g = 2,
         .norm_groups = 2,
         .D_has_hdim = true,
         .norm_before_gate = true,
         .embedding = kOriginal},
    };
}

}  // namespace ssm::test
