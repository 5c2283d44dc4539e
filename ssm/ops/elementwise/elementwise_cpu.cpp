// CPU kernels of the elementwise functions: one vector loop per function over one run of elements that are
// dense in every argument. Dense matrices are one run, strided ones a run per row.
#include "ssm/ops/elementwise/elementwise_impl.h"

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/elementwise/elementwise_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h, once per instruction set
#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// y[i] = f(x[i])
template <class X, class Y, class F>
HWY_INLINE void Map(int64_t n, const X* x, Y* y, const F& f) {
    const DF d;
    ForEachVector(d, n,
                  [&](int64_t i, auto lanes) HWY_ATTR { Store(d, f(Load(d, x + i, lanes)), y + i, lanes); });
}

// y[i] = f(y[i], a[i], b[i])
template <class F>
HWY_INLINE void Update(int64_t n, const float* a, const float* b, float* y, const F& f) {
    const DF d;
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        Store(d, f(Load(d, y + i, lanes), Load(d, a + i, lanes), Load(d, b + i, lanes)), y + i, lanes);
    });
}

// The clamps inside Exp would turn NaN into a number.
HWY_INLINE VF KeepNan(VF x, VF y) { return hn::IfThenElse(hn::IsNaN(x), x, y); }

void UnaryRun(Unary f, int64_t n, const float* x, float* y) {
    const DF d;
    switch (f) {
        case Unary::neg_exp:
            return Map(n, x, y, [d](VF v) HWY_ATTR { return KeepNan(v, hn::Neg(Exp(d, v))); });
        case Unary::silu: return Map(n, x, y, [d](VF v) HWY_ATTR { return Silu(d, v); });
        case Unary::softplus: return Map(n, x, y, [d](VF v) HWY_ATTR { return KeepNan(v, Softplus(d, v)); });
    }
}

void UnaryBackwardRun(Unary f, int64_t n, const float* x_or_y, const float* grad_y, float* grad_x) {
    const DF d;
    switch (f) {
        case Unary::neg_exp:
            return Update(n, x_or_y, grad_y, grad_x,
                          [](VF sum, VF y, VF grad) HWY_ATTR { return hn::MulAdd(y, grad, sum); });
        case Unary::silu:
            return Update(n, x_or_y, grad_y, grad_x, [d](VF sum, VF x, VF grad) HWY_ATTR {
                return hn::MulAdd(SiluDerivative(d, x), grad, sum);
            });
        case Unary::softplus:
            return Update(n, x_or_y, grad_y, grad_x, [d](VF sum, VF x, VF grad) HWY_ATTR {
                return hn::MulAdd(KeepNan(x, Sigmoid(d, x)), grad, sum);
            });
    }
}

void BinaryRun(Binary f, int64_t n, const float* a, const float* b, float* y) {
    const DF d;
    const auto run = [&](const auto& op) HWY_ATTR {
        ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
            Store(d, op(Load(d, a + i, lanes), Load(d, b + i, lanes)), y + i, lanes);
        });
    };
    switch (f) {
        case Binary::add: return run([](VF u, VF v) HWY_ATTR { return hn::Add(u, v); });
        case Binary::multiply: return run([](VF u, VF v) HWY_ATTR { return hn::Mul(u, v); });
    }
}

void AccumulateProductRun(int64_t n, const float* x, const float* b, float* y) {
    Update(n, x, b, y, [](VF sum, VF u, VF v) HWY_ATTR { return hn::MulAdd(u, v, sum); });
}

template <class X, class Y>
HWY_INLINE void Accumulate(int64_t n, const X* x, Y* y, float scale) {
    const DF d;
    const VF scales = hn::Set(d, scale);
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        Store(d, hn::MulAdd(Load(d, x + i, lanes), scales, Load(d, y + i, lanes)), y + i, lanes);
    });
}

// Highway dispatches plain functions, one for each pair of types.
void AccumulateF32F32(int64_t n, const float* x, float* y, float scale) { Accumulate(n, x, y, scale); }
void AccumulateF32Bf16(int64_t n, const float* x, bf16* y, float scale) { Accumulate(n, x, y, scale); }
void AccumulateBf16F32(int64_t n, const bf16* x, float* y, float scale) { Accumulate(n, x, y, scale); }
void AccumulateBf16Bf16(int64_t n, const bf16* x, bf16* y, float scale) { Accumulate(n, x, y, scale); }

void CastDownRun(int64_t n, const float* x, bf16* y) {
    Map(n, x, y, [](VF v) HWY_ATTR { return v; });
}
void CastUpRun(int64_t n, const bf16* x, float* y) {
    Map(n, x, y, [](VF v) HWY_ATTR { return v; });
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cpu {
namespace {

HWY_EXPORT(UnaryRun);
HWY_EXPORT(UnaryBackwardRun);
HWY_EXPORT(BinaryRun);
HWY_EXPORT(AccumulateProductRun);
HWY_EXPORT(AccumulateF32F32);
HWY_EXPORT(AccumulateF32Bf16);
HWY_EXPORT(AccumulateBf16F32);
HWY_EXPORT(AccumulateBf16Bf16);
HWY_EXPORT(CastDownRun);
HWY_EXPORT(CastUpRun);

// A thread is worth waking for this many elements (measured: README.md).
constexpr int64_t kGrainElements = 32768;

// Splits [t d] over threads and calls run(n, pointers...) for runs that are dense in every view.
template <class Run, class... V>
void for_each_run(const Exec& ex, const Run& run, const V&... views) {
    const auto& shape = std::get<0>(std::tie(views...)).shape;
    const int64_t t = shape[0], d = shape[1];
    const bool dense = (views.dense() && ...);
    const int64_t rows = dense ? 1 : t, width = dense ? t * d : d;
    parallel_for(ex, rows * width, kGrainElements, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t row = begin / width, column = begin % width;
            const int64_t n = std::min(end - begin, width - column);
            run(n, (dense ? views.data + column : views.row(row) + column)...);
            begin += n;
        }
    });
}

}  // namespace

void unary(const Exec& ex, Unary f, View<const float, 2> x, View<float, 2> y) {
    const auto kernel = HWY_DYNAMIC_DISPATCH(UnaryRun);
    for_each_run(
        ex, [&](int64_t n, const float* a, float* b) { kernel(f, n, a, b); }, x, y);
}

void unary_backward(const Exec& ex, Unary f, View<const float, 2> x_or_y, View<const float, 2> grad_y,
                    View<float, 2> grad_x) {
    const auto kernel = HWY_DYNAMIC_DISPATCH(UnaryBackwardRun);
    for_each_run(
        ex, [&](int64_t n, const float* a, const float* g, float* out) { kernel(f, n, a, g, out); }, x_or_y,
        grad_y, grad_x);
}

void binary(const Exec& ex, Binary f, View<const float, 2> a, View<const float, 2> b, View<float, 2> y) {
    const auto kernel = HWY_DYNAMIC_DISPATCH(BinaryRun);
    for_each_run(
        ex, [&](int64_t n, const float* u, const float* v, float* out) { kernel(f, n, u, v, out); }, a, b, y);
}

void accumulate_product(const Exec& ex, View<const float, 2> x, View<const float, 2> b, View<float, 2> y) {
    for_each_run(ex, HWY_DYNAMIC_DISPATCH(AccumulateProductRun), x, b, y);
}

template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale) {
    const auto kernel = [] {
        if constexpr (std::is_same_v<X, float> && std::is_same_v<Y, float>)
            return HWY_DYNAMIC_DISPATCH(AccumulateF32F32);
        else if constexpr (std::is_same_v<X, float>)
            return HWY_DYNAMIC_DISPATCH(AccumulateF32Bf16);
        else if constexpr (std::is_same_v<Y, float>)
            return HWY_DYNAMIC_DISPATCH(AccumulateBf16F32);
        else
            return HWY_DYNAMIC_DISPATCH(AccumulateBf16Bf16);
    }();
    for_each_run(
        ex, [&](int64_t n, const X* a, Y* b) { kernel(n, a, b, scale); }, x, y);
}
template void accumulate(const Exec&, View<const float, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const float, 2>, View<bf16, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<bf16, 2>, float);

template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y) {
    if constexpr (std::is_same_v<X, Y>) {
        for_each_run(
            ex, [](int64_t n, const X* a, Y* b) { std::copy_n(a, n, b); }, x, y);
    } else if constexpr (std::is_same_v<X, float>) {
        for_each_run(ex, HWY_DYNAMIC_DISPATCH(CastDownRun), x, y);
    } else {
        for_each_run(ex, HWY_DYNAMIC_DISPATCH(CastUpRun), x, y);
    }
}
template void cast(const Exec&, View<const float, 2>, View<float, 2>);
template void cast(const Exec&, View<const float, 2>, View<bf16, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<float, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm::cpu
#endif  // HWY_ONCE
