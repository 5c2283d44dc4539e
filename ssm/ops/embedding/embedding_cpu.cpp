// CPU kernels of embedding. Forward: threads share the tokens. Backward: threads share the columns, so every
// row of the gradient is summed in the order of t whatever the number of threads.
#include "ssm/ops/embedding/embedding_impl.h"

#include <algorithm>
#include <type_traits>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/embedding/embedding_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h, once per instruction set
#include "ssm/core/simd_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using DF = hn::ScalableTag<float>;

template <class X, class Y>
HWY_INLINE void CopyRow(int64_t n, const X* x, Y* y) {
    const DF d;
    ForEachVector(d, n,
                  [&](int64_t i, auto lanes) HWY_ATTR { Store(d, Load(d, x + i, lanes), y + i, lanes); });
}
void CopyRowDown(int64_t n, const float* x, bf16* y) { CopyRow(n, x, y); }
void CopyRowUp(int64_t n, const bf16* x, float* y) { CopyRow(n, x, y); }

void AddRow(int64_t n, const float* x, float* y) {
    const DF d;
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        Store(d, hn::Add(Load(d, y + i, lanes), Load(d, x + i, lanes)), y + i, lanes);
    });
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cpu {
namespace {

HWY_EXPORT(CopyRowDown);
HWY_EXPORT(CopyRowUp);
HWY_EXPORT(AddRow);

// A thread is worth waking for this many elements.
constexpr int64_t kGrainElements = 32768;
// Columns of one thread: whole cache lines, and runs long enough for the hardware prefetcher.
constexpr int64_t kGrainColumns = 64;

template <class W, class Y>
auto copy_kernel() {
    if constexpr (std::is_same_v<W, Y>)
        return [](int64_t n, const W* x, Y* y) { std::copy_n(x, n, y); };
    else if constexpr (std::is_same_v<W, float>)
        return HWY_DYNAMIC_DISPATCH(CopyRowDown);
    else
        return HWY_DYNAMIC_DISPATCH(CopyRowUp);
}

}  // namespace

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y) {
    const int64_t e = weight.shape[1];
    const auto copy = copy_kernel<W, Y>();
    parallel_for(ex, ids.shape[0], kGrainElements / std::max<int64_t>(e, 1), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) copy(e, weight.row(ids(t)), y.row(t));
    });
}

void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight) {
    const int64_t t = ids.shape[0], e = grad_weight.shape[1];
    const auto add_row = HWY_DYNAMIC_DISPATCH(AddRow);
    const int64_t columns = kGrainElements / std::max<int64_t>(t, 1) / kGrainColumns * kGrainColumns;
    parallel_for(ex, e, std::max(columns, kGrainColumns), [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < t; ++i) {
            add_row(end - begin, grad_y.row(i) + begin, grad_weight.row(ids(i)) + begin);
        }
    });
}

template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<bf16, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm::cpu
#endif  // HWY_ONCE
