// What a backend of adamw provides. Private to ssm/ops/adamw: arguments are already checked.
#pragma once

#include "ssm/ops/adamw/adamw.h"

namespace ssm {

// The step with its constants folded:
//   m = beta1 m + g1 grad,  v = beta2 v + g2 grad^2,  p = decay p - rate m / (sqrt(v) inv_bias2 + eps)
struct AdamWConstants {
    float beta1, g1;  // g1 = (1 - beta1) scale, scale = min(1, clip / norm)
    float beta2, g2;  // g2 = (1 - beta2) scale^2
    float decay;      // 1 - lr weight_decay
    float rate;       // lr / bias1
    float inv_bias2;  // 1 / sqrt(bias2)
    float eps;
};

// A piece of a parameter, what a block of a GPU's kernels takes: at most kAdamWPiece elements.
inline constexpr int64_t kAdamWPiece = 4096;
struct alignas(16) AdamWPiece {
    float *param, *grad, *m, *v;
    bf16* rounded;  // or null
    int16_t count;
    bool keep_grad;
    float weight_decay;
};

namespace cpu {

// One parameter; `rounded` may be null. Sets grad to zero unless keep_grad.
void adamw_step(const Exec& ex, int64_t count, float* param, float* grad, float* m, float* v, bf16* rounded,
                const AdamWConstants& c, bool keep_grad);

double squared_norm(const Exec& ex, int64_t count, const float* x);

}  // namespace cpu

namespace cuda {

void adamw_step(const Exec& ex, const AdamWPiece* pieces, int64_t count, const AdamWOptions& options,
                const float* rates, const float* norm);

void gradient_norm(const Exec& ex, const AdamWPiece* pieces, int64_t count, float* norm);

}  // namespace cuda
}  // namespace ssm
