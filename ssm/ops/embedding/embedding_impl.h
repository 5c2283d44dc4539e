// What a backend of embedding provides. Private to ssm/ops/embedding: arguments and ids are already checked.
#pragma once

#include "ssm/ops/embedding/embedding.h"

namespace ssm {
namespace cpu {

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y);

void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight);

}  // namespace cpu

namespace cuda {

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y);

void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight);

}  // namespace cuda
}  // namespace ssm
