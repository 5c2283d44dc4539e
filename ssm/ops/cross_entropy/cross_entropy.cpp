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

// A Tensor on borrowed rows.
Tensor borrow(View<const float, 2> v) {
    const int64_t stride = std::max(v.stride, v.shape[1]);
    return Tensor::wrap(const_cast<float*>(v.data), {v.shape[0], stride}, DType::f32, nullptr)
        .columns(0, v.shape[1]);
}

template <class T>
View<T, 2> rows_of(View<T, 2> v, int64_t begin, int64_t end) {
    return v ? View<T, 2>(v.row(begin), {end - begin, v.shape[1]}, v.stride) : v;
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

void linear_cross_entropy_backward(const Exec& ex, View<const float, 2> hidden, View<const float, 2> weight,
                                   View<const int32_t, 1> targets, View<const float, 1> grad_nll,
                                   View<float, 1> nll, View<float, 2> grad_hidden,
                                   View<float, 2> grad_weight) {
    constexpr std::string_view op = "linear_cross_entropy_backward";
    require_device(op, ex);
    require(static_cast<bool>(weight), op, "`weight` is absent");
    const int64_t v = weight.shape[0], e = weight.shape[1], t = hidden.shape[0];
    if (t == 0) return;
    require_shape(op, "hidden", "t e", hidden, {t, e});
    require_shape(op, "targets", "t", targets, {t});
    require_shape(op, "grad_nll", "t", grad_nll, {t});
    require_shape(op, "nll", "t", nll, {t});
    require_shape_if(op, "grad_hidden", "t e", grad_hidden, {t, e});
    require_shape_if(op, "grad_weight", "v e", grad_weight, {v, e});
    require_dense(op, "targets", targets);
    require_dense(op, "grad_nll", grad_nll);
    require_dense(op, "nll", nll);
    check_targets(op, ex, targets, v);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::linear_cross_entropy_backward(ex, hidden, weight, targets, grad_nll, nll,
                                                       grad_hidden, grad_weight);
    }
    const Tensor weight_tensor = borrow(weight), hidden_tensor = borrow(hidden);
    const int64_t tile = tile_rows(t, v);
    const Tensor logits = Tensor::empty(ex, {tile, v});
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t end = std::min(t, at + tile);
        const Tensor rows = logits.rows(0, end - at), x = hidden_tensor.rows(at, end);
        linear(ex, x, weight_tensor, {}, rows);
        cross_entropy_detail::nll_and_gradients_of_rows(
            ex, {end - at, v, logits.data<float>(), targets.data + at, nll.data + at, grad_nll.data + at});
        linear_backward(ex, rows.view<const float, 2>(), x, weight, rows_of(grad_hidden, at, end),
                        grad_weight, {});
    }
}

}  // namespace ssm
