#include "ssm/ops/adamw/adamw.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ssm/ops/adamw/adamw_impl.h"

namespace ssm {
namespace {

void require_parameter(const AdamWParameter& p) {
    constexpr std::string_view op = "adamw";
    require(p.param || p.param.shape[0] == 0, op, "`param` is absent");
    if (p.param.shape[0] == 0) return;
    require_shape(op, "grad", "count", p.grad, p.param.shape);
    require_shape(op, "m", "count", p.m, p.param.shape);
    require_shape(op, "v", "count", p.v, p.param.shape);
    require_shape_if(op, "rounded", "count", p.rounded, p.param.shape);
    require(p.param.dense() && p.grad.dense() && p.m.dense() && p.v.dense() && p.rounded.dense(), op,
            "arguments must be dense");
    require(std::isfinite(p.weight_decay) && p.weight_decay >= 0, op,
            "weight_decay must be finite and >= 0 but is {}", p.weight_decay);
}

void require_options(std::string_view op, const AdamWOptions& o) {
    require(o.beta1 >= 0 && o.beta1 < 1, op, "beta1 must be in [0, 1) but is {}", o.beta1);
    require(o.beta2 >= 0 && o.beta2 < 1, op, "beta2 must be in [0, 1) but is {}", o.beta2);
    require(std::isfinite(o.eps) && o.eps >= 0, op, "eps must be finite and >= 0 but is {}", o.eps);
    require(std::isfinite(o.clip) && o.clip >= 0, op, "clip must be finite and >= 0 but is {}", o.clip);
}

// Folded in f64: 0.999 is not a float.
AdamWConstants constants_of(const AdamWOptions& o, const float* rates, double norm) {
    const double lr = static_cast<double>(rates[0]);
    const double scale = o.clip > 0 ? std::min(1.0, static_cast<double>(o.clip) / norm) : 1.0;
    const double beta1 = static_cast<double>(o.beta1), beta2 = static_cast<double>(o.beta2);
    const double clipped = static_cast<double>(static_cast<float>(scale));
    return {
        .beta1 = o.beta1,
        .g1 = static_cast<float>((1.0 - beta1) * clipped),
        .beta2 = o.beta2,
        .g2 = static_cast<float>((1.0 - beta2) * clipped * clipped),
        .decay = 1.0f,
        .rate = static_cast<float>(lr / static_cast<double>(rates[1])),
        .inv_bias2 = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rates[2]))),
        .eps = o.eps,
    };
}

std::vector<AdamWPiece> pieces_of(const std::vector<AdamWParameter>& parameters) {
    std::vector<AdamWPiece> pieces;
    for (const AdamWParameter& p : parameters) {
        const int64_t count = p.param.shape[0];
        for (int64_t i = 0; i < count; i += kAdamWPiece)
            pieces.push_back({p.param.data + i, p.grad.data + i, p.m.data + i, p.v.data + i,
                              p.rounded ? p.rounded.data + i : nullptr,
                              static_cast<int16_t>(std::min(kAdamWPiece, count - i)), p.keep_grad,
                              p.weight_decay});
    }
    return pieces;
}

const AdamWPiece* pieces_of(const AdamWTable& table) {
    return reinterpret_cast<const AdamWPiece*>(table.pieces().raw());
}

}  // namespace

AdamWTable::AdamWTable(const Exec& ex, std::vector<AdamWParameter> parameters)
    : parameters_(std::move(parameters)) {
    require_device("adamw", ex);
    for (const AdamWParameter& p : parameters_) require_parameter(p);
    if (ex.device == Device::cpu) return;
    const std::vector<AdamWPiece> pieces = pieces_of(parameters_);
    piece_count_ = std::ssize(pieces);
    if (pieces.empty()) return;
    const auto bytes = pieces.size() * sizeof(AdamWPiece);
    const Tensor host = Tensor::empty({static_cast<int64_t>(bytes)}, DType::u8);
    std::memcpy(host.raw(), pieces.data(), bytes);
    pieces_ = host.to(ex);
}

void gradient_norm(const Exec& ex, const AdamWTable& table, View<float, 1> norm) {
    constexpr std::string_view op = "gradient_norm";
    require_device(op, ex);
    require_shape(op, "norm", "1", norm, {1});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::gradient_norm(ex, pieces_of(table), table.piece_count(), norm.data);
    }
    double sum = 0;
    for (const AdamWParameter& p : table.parameters())
        sum += cpu::squared_norm(ex, p.grad.shape[0], p.grad.data);
    norm.data[0] = static_cast<float>(std::sqrt(sum));
}

void adamw_step(const Exec& ex, const AdamWTable& table, const AdamWOptions& options,
                View<const float, 1> rates, View<const float, 1> norm) {
    constexpr std::string_view op = "adamw_step";
    require_device(op, ex);
    require_options(op, options);
    require_shape(op, "rates", "3", rates, {3});
    require(rates.dense(), op, "`rates` must be dense");
    require_shape(op, "norm", "1", norm, {1});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::adamw_step(ex, pieces_of(table), table.piece_count(), options, rates.data,
                                    norm.data);
    }
    const bool good = std::isfinite(norm.data[0]);
    AdamWConstants c = constants_of(options, rates.data, static_cast<double>(norm.data[0]));
    for (const AdamWParameter& p : table.parameters()) {
        const int64_t count = p.param.shape[0];
        if (!good) {
            if (!p.keep_grad) std::fill_n(p.grad.data, count, 0.0f);
            continue;
        }
        c.decay = static_cast<float>(1.0 - static_cast<double>(rates.data[0]) *
                                               static_cast<double>(p.weight_decay));
        cpu::adamw_step(ex, count, p.param.data, p.grad.data, p.m.data, p.v.data, p.rounded.data, c,
                        p.keep_grad);
    }
}

}  // namespace ssm
