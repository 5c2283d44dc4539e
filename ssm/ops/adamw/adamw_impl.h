// What a backend of adamw provides. Private to ssm/ops/adamw: arguments are already checked.
#pragma once

#include "ssm/ops/adamw/adamw.h"

namespace ssm {

// The step with its constants folded:
//   m = beta1 m + g1 grad,  v = beta2 v + g2 grad^2,  p = decay p - rate m / (sqrt(v) inv_bias2 + eps)
struct AdamWConstants {
    float beta1, g1;  // g1 = (1 - beta1) grad_scale
    float beta2, g2;  // g2 = (1 - beta2) grad_scale^2
    float decay;      // 1 - lr weight_decay
    float rate;       // lr / (1 - beta1^step)
    float inv_bias2;  // 1 / sqrt(1 - beta2^step)
    float eps;
};

namespace cpu {

void adamw_step(const Exec& ex, int64_t count, float* param, const float* grad, float* m, float* v,
                const AdamWConstants& c);

double squared_norm(const Exec& ex, int64_t count, const float* x);

}  // namespace cpu

namespace cuda {

void adamw_step(const Exec& ex, int64_t count, float* param, const float* grad, float* m, float* v,
                const AdamWConstants& c);

double squared_norm(const Exec& ex, int64_t count, const float* x);

}  // namespace cuda
}  // namespace ssm
