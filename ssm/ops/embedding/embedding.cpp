#include "ssm/ops/embedding/embedding.h"

#include "ssm/core/dtype.h"
#include "ssm/ops/embedding/embedding_impl.h"

namespace ssm {
namespace {

void require_ids(std::string_view op, const Exec& ex, View<const int32_t, 1> ids, int64_t v) {
    require(ids || ids.shape[0] == 0, op, "`ids` is absent");
    if (ex.device != Device::cpu) return;  // only the device can read them
    for (int64_t t = 0; t < ids.shape[0]; ++t) {
        require(ids(t) >= 0 && ids(t) < v, op, "ids[{}] = {} is outside the vocabulary [0, {})", t, ids(t),
                v);
    }
}

}  // namespace

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y) {
    constexpr std::string_view op = "embedding";
    require_device(op, ex);
    require(static_cast<bool>(weight), op, "`weight` is absent");
    require_shape(op, "y", "t e", y, {ids.shape[0], weight.shape[1]});
    require_ids(op, ex, ids, weight.shape[0]);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::embedding(ex, ids, weight, y);
    }
    cpu::embedding(ex, ids, weight, y);
}

void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight) {
    constexpr std::string_view op = "embedding_backward";
    require_device(op, ex);
    require(static_cast<bool>(grad_weight), op, "`grad_weight` is absent");
    require_shape(op, "grad_y", "t e", grad_y, {ids.shape[0], grad_weight.shape[1]});
    require_ids(op, ex, ids, grad_weight.shape[0]);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::embedding_backward(ex, ids, grad_y, grad_weight);
    }
    cpu::embedding_backward(ex, ids, grad_y, grad_weight);
}

template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<bf16, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm
