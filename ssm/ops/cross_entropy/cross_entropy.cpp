#include "ssm/ops/cross_entropy/cross_entropy.h"

#include <algorithm>

#include "ssm/ops/cross_entropy/cross_entropy_impl.h"

namespace ssm {
namespace {

using cross_entropy_detail::Rows;
using cross_entropy_detail::tile_rows;

void check_targets(std::string_view op, const Exec& ex, View<const int32_t, 1> targets, int64_t v) {
    if (ex.device != Device::cpu) return;  // only the device can read them
    for (int64_t i = 0; i < targets.shape[0]; ++i) {
        require(targets.data[i] < v, op, "target {} at position {} is not below the vocabulary's {} entries",
                targets.data[i], i, v);
    }
}

template <class T>
void require_dense(std::string_view op, std::string_view name, const View<T, 1>& view) {
    require(view.shape[0] <= 1 || view.stride == 1, op, "`{}` must be dense", name);
}

void require_matrix(std::string_view op, std::string_view name, std::string_view letters, const Tensor& t,
                    int64_t rows, int64_t columns) {
    require(t && (t.dtype() == DType::f32 || t.dtype() == DType::bf16), op,
            "`{}` must be f32 or bf16 but is {}", name, t ? name_of(t.dtype()) : "absent");
    require(t.rank() == 2 && t.dim(0) == rows && t.dim(1) == columns, op,
            "`{}` must be [{}] = [{}, {}] but is {}", name, letters, rows, columns, to_string(t.shape()));
}

void check_backward(std::string_view op, const Exec& ex, const Tensor& hidden, const Tensor& weight,
                    const Tensor& grad_hidden) {
    require(hidden && hidden.rank() == 2, op, "`hidden` must be a matrix");
    require(weight && weight.rank() == 2, op, "`weight` must be a matrix");
    const int64_t t = hidden.dim(0), e = weight.dim(1);
    require_matrix(op, "hidden", "t e", hidden, t, e);
    require_matrix(op, "weight", "v e", weight, weight.dim(0), e);
    if (grad_hidden) {
        require_matrix(op, "grad_hidden", "t e", grad_hidden, t, e);
        require(grad_hidden.dtype() == hidden.dtype(), op,
                "`grad_hidden` must have hidden's type, {}, but is {}", name_of(hidden.dtype()),
                name_of(grad_hidden.dtype()));
    }
    if (ex.device == Device::cpu && (hidden.dtype() != DType::f32 || weight.dtype() != DType::f32))
        fail(ErrorCode::unsupported, op, "gradients of bf16 activations need a GPU");
}

}  // namespace

int64_t cross_entropy_detail::tile_rows(int64_t t, int64_t v) {
    constexpr int64_t max_bytes = int64_t{32} << 20;
    const int64_t most = std::max<int64_t>(1, max_bytes / (std::max<int64_t>(v, 1) * 4));
    const int64_t tiles = (t + most - 1) / most;
    return tiles <= 1 ? t : (t + tiles - 1) / tiles;
}

void linear_cross_entropy(const Exec& ex, const Tensor& hidden, const PackedWeight& weight,
                          View<const int32_t, 1> targets, View<float, 1> nll) {
    constexpr std::string_view op = "linear_cross_entropy";
    require_device(op, ex);
    require(static_cast<bool>(weight), op, "`weight` is absent");
    const int64_t v = weight.weight().dim(0), e = weight.weight().dim(1);
    require(hidden && hidden.rank() == 2 && hidden.dim(1) == e, op, "`hidden` must be [t {}] but is {}", e,
            hidden ? to_string(hidden.shape()) : "absent");
    const int64_t t = hidden.dim(0);
    if (t == 0) return;
    require_shape(op, "targets", "t", targets, {t});
    require_shape(op, "nll", "t", nll, {t});
    require_dense(op, "targets", targets);
    require_dense(op, "nll", nll);
    check_targets(op, ex, targets, v);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::linear_cross_entropy(ex, hidden, weight, targets, nll);
    }
    const int64_t tile = tile_rows(t, v);
    const Tensor logits = Tensor::empty(ex, {tile, v});
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t end = std::min(t, at + tile);
        linear(ex, hidden.rows(at, end), weight, {}, logits.rows(0, end - at));
        cross_entropy_detail::nll_of_rows(
            ex, {end - at, v, logits.data<float>(), targets.data + at, nll.data + at, nullptr});
    }
}

void linear_cross_entropy_backward(const Exec& ex, const Tensor& hidden, const Tensor& weight,
                                   View<const int32_t, 1> targets, View<const float, 1> grad_nll,
                                   View<float, 1> nll, const Tensor& grad_hidden, View<float, 2> grad_weight,
                                   LinearCrossEntropySet set) {
    constexpr std::string_view op = "linear_cross_entropy_backward";
    require_device(op, ex);
    check_backward(op, ex, hidden, weight, grad_hidden);
    const int64_t v = weight.dim(0), e = weight.dim(1), t = hidden.dim(0);
    if (t == 0) return;
    require_shape(op, "targets", "t", targets, {t});
    require_shape(op, "grad_nll", "t", grad_nll, {t});
    require_shape(op, "nll", "t", nll, {t});
    require_shape_if(op, "grad_weight", "v e", grad_weight, {v, e});
    require_dense(op, "targets", targets);
    require_dense(op, "grad_nll", grad_nll);
    require_dense(op, "nll", nll);
    check_targets(op, ex, targets, v);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::linear_cross_entropy_backward(
                ex, {hidden, weight, targets, grad_nll, nll, grad_hidden, grad_weight, set});
    }
    const int64_t tile = tile_rows(t, v);
    const Tensor logits = Tensor::empty(ex, {tile, v});
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t end = std::min(t, at + tile);
        const Tensor rows = logits.rows(0, end - at), x = hidden.rows(at, end);
        linear(ex, x, weight, {}, rows);
        cross_entropy_detail::nll_and_gradients_of_rows(
            ex, {end - at, v, logits.data<float>(), targets.data + at, nll.data + at, grad_nll.data + at});
        linear_backward(ex, rows, x, weight, grad_hidden ? grad_hidden.rows(at, end) : Tensor(), grad_weight,
                        {}, {.x = set.hidden, .weight = set.weight && at == 0});
    }
}

void mean_nll(const Exec& ex, View<const float, 1> nll, double counted, View<float, 1> mean) {
    constexpr std::string_view op = "mean_nll";
    require_device(op, ex);
    require(nll || nll.shape[0] == 0, op, "`nll` is absent");
    require_dense(op, "nll", nll);
    require_shape(op, "mean", "1", mean, {1});
    require(counted > 0, op, "`counted` must be positive but is {}", counted);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::mean_nll(ex, nll, counted, mean.data);
    }
    double sum = 0;
    for (int64_t i = 0; i < nll.shape[0]; ++i) sum += static_cast<double>(nll.data[i]);
    mean.data[0] = static_cast<float>(sum / counted);
}

}  // namespace ssm
