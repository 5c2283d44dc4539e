#include "ssm/ops/adamw/adamw.h"

#include <cmath>

#include "ssm/ops/adamw/adamw_impl.h"

namespace ssm {
namespace {

void require_options(std::string_view op, const AdamWOptions& o) {
    require(std::isfinite(o.lr) && o.lr >= 0, op, "lr must be finite and >= 0 but is {}", o.lr);
    require(o.beta1 >= 0 && o.beta1 < 1, op, "beta1 must be in [0, 1) but is {}", o.beta1);
    require(o.beta2 >= 0 && o.beta2 < 1, op, "beta2 must be in [0, 1) but is {}", o.beta2);
    require(std::isfinite(o.eps) && o.eps >= 0, op, "eps must be finite and >= 0 but is {}", o.eps);
    require(std::isfinite(o.weight_decay) && o.weight_decay >= 0, op,
            "weight_decay must be finite and >= 0 but is {}", o.weight_decay);
    require(o.step >= 1, op, "step must be at least 1 but is {}", o.step);
    require(std::isfinite(o.grad_scale), op, "grad_scale must be finite but is {}", o.grad_scale);
}

}  // namespace

void adamw_step(const Exec& ex, View<float, 1> param, View<const float, 1> grad, View<float, 1> m,
                View<float, 1> v, const AdamWOptions& options) {
    constexpr std::string_view op = "adamw_step";
    require_device(op, ex);
    require(static_cast<bool>(param), op, "`param` is absent");
    require_shape(op, "grad", "count", grad, param.shape);
    require_shape(op, "m", "count", m, param.shape);
    require_shape(op, "v", "count", v, param.shape);
    require(param.dense() && grad.dense() && m.dense() && v.dense(), op, "arguments must be dense");
    require_options(op, options);
    // In f64: 1 - beta^step cancels, and beta = 0.999 is not a float.
    const double step = static_cast<double>(options.step);
    const double bias1 = 1.0 - std::pow(static_cast<double>(options.beta1), step);
    const double bias2 = 1.0 - std::pow(static_cast<double>(options.beta2), step);
    const double lr = options.lr, scale = options.grad_scale;
    const AdamWConstants c{
        .beta1 = options.beta1,
        .g1 = static_cast<float>((1.0 - static_cast<double>(options.beta1)) * scale),
        .beta2 = options.beta2,
        .g2 = static_cast<float>((1.0 - static_cast<double>(options.beta2)) * scale * scale),
        .decay = static_cast<float>(1.0 - lr * static_cast<double>(options.weight_decay)),
        .rate = static_cast<float>(lr / bias1),
        .inv_bias2 = static_cast<float>(1.0 / std::sqrt(bias2)),
        .eps = options.eps,
    };
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::adamw_step(ex, param.shape[0], param.data, grad.data, m.data, v.data, c);
    }
    cpu::adamw_step(ex, param.shape[0], param.data, grad.data, m.data, v.data, c);
}

double squared_norm(const Exec& ex, View<const float, 1> x) {
    constexpr std::string_view op = "squared_norm";
    require_device(op, ex);
    require(x || x.shape[0] == 0, op, "`x` is absent");
    require(x.dense(), op, "`x` must be dense");
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::squared_norm(ex, x.shape[0], x.data);
    }
    return cpu::squared_norm(ex, x.shape[0], x.data);
}

}  // namespace ssm
