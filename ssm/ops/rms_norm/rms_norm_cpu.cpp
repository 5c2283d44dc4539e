// CPU kernels of rms_norm. A row is read from memory once: the first pass over a group sums v^2, the second
// finds the group in the L1 cache. Gated rows keep v (and sigmoid(z)) in a scratch row, so that the
// exponential is computed once.
#include "ssm/ops/rms_norm/rms_norm_impl.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/rms_norm/rms_norm_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h, once per instruction set
#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using Gate = RmsNormOptions::Gate;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// Sum over i of f(i, lanes)^2, in four accumulators that hide the latency of the multiply-add.
template <class F>
HWY_INLINE float SumOfSquares(int64_t n, const F& f) {
    const DF d;
    const int64_t width = static_cast<int64_t>(hn::Lanes(d));
    VF s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * width <= n; i += 4 * width) {
        const VF v0 = f(i, AllLanes{}), v1 = f(i + width, AllLanes{});
        const VF v2 = f(i + 2 * width, AllLanes{}), v3 = f(i + 3 * width, AllLanes{});
        s0 = hn::MulAdd(v0, v0, s0);
        s1 = hn::MulAdd(v1, v1, s1);
        s2 = hn::MulAdd(v2, v2, s2);
        s3 = hn::MulAdd(v3, v3, s3);
    }
    for (; i + width <= n; i += width) {
        const VF v = f(i, AllLanes{});
        s0 = hn::MulAdd(v, v, s0);
    }
    if (i < n) {
        const VF v = f(i, SomeLanes{n - i});
        s1 = hn::MulAdd(v, v, s1);
    }
    return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

// y = v * scale * (weight + offset) * silu(z); weight and z where present.
template <bool kWeighted, bool kGated, class V, class Y>
HWY_INLINE void ScaleRow(int64_t n, const V* v, float scale, const float* weight, float offset, const Y* z,
                         Y* y) {
    const DF d;
    const VF scales = hn::Set(d, scale), offsets = hn::Set(d, offset);
    ForEachVector(d, n, [&](int64_t i, auto lanes) HWY_ATTR {
        VF r = hn::Mul(Load(d, v + i, lanes), scales);
        if constexpr (kWeighted) r = hn::Mul(r, hn::Add(Load(d, weight + i, lanes), offsets));
        if constexpr (kGated) r = hn::Mul(r, Silu(d, Load(d, z + i, lanes)));
        Store(d, r, y + i, lanes);
    });
}

template <class V, class Y>
HWY_INLINE void ScaleGroup(int64_t n, const V* v, float scale, const float* weight, float offset, const Y* z,
                           Y* y) {
    if (weight != nullptr && z != nullptr) return ScaleRow<true, true>(n, v, scale, weight, offset, z, y);
    if (weight != nullptr) return ScaleRow<true, false>(n, v, scale, weight, offset, z, y);
    if (z != nullptr) return ScaleRow<false, true>(n, v, scale, weight, offset, z, y);
    ScaleRow<false, false>(n, v, scale, weight, offset, z, y);
}

// Rows begin .. end. `scratch`: d floats, used with gate before.
template <class X, class Y>
HWY_INLINE void ForwardRows(const RmsNormCall<X, Y>& call, float* scratch, int64_t begin, int64_t end) {
    const DF d;
    const auto& [residual, in, residual_out, y, rstd, options] = call;
    const int64_t groups = options.groups, n = in.x.shape[1] / groups;
    const float offset = options.unit_offset ? 1.0f : 0.0f;
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t g = 0; g < groups; ++g) {
            const X* x = in.x.row(t) + g * n;
            const float* weight = in.weight ? in.weight.data + g * n : nullptr;
            const Y* z = in.z ? in.z.row(t) + g * n : nullptr;
            const float* kept = nullptr;  // v, where it is not x
            float sum = 0;
            if (residual) {
                const float* r = residual.row(t) + g * n;
                float* out = residual_out.row(t) + g * n;
                sum = SumOfSquares(n, [&](int64_t i, auto lanes) HWY_ATTR {
                    const VF v = hn::Add(Load(d, r + i, lanes), Load(d, x + i, lanes));
                    Store(d, v, out + i, lanes);
                    return v;
                });
                kept = out;
            } else if (options.gate == Gate::before) {
                sum = SumOfSquares(n, [&](int64_t i, auto lanes) HWY_ATTR {
                    const VF v = hn::Mul(Load(d, x + i, lanes), Silu(d, Load(d, z + i, lanes)));
                    Store(d, v, scratch + i, lanes);
                    return v;
                });
                kept = scratch;
                z = nullptr;
            } else {
                sum = SumOfSquares(n, [&](int64_t i, auto lanes) HWY_ATTR { return Load(d, x + i, lanes); });
            }
            const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + options.eps);
            if (rstd) rstd.row(t)[g] = scale;
            if (kept != nullptr) {
                ScaleGroup(n, kept, scale, weight, offset, z, y.row(t) + g * n);
            } else {
                ScaleGroup(n, x, scale, weight, offset, z, y.row(t) + g * n);
            }
        }
    }
}

// One group of one row of the backward pass; pointers are to the group's first channel.
struct BackwardGroup {
    int64_t n;
    float rstd;
    const float* x;
    const float* z;
    const float* grad_y;
    const float* weight;  // with the offset; 1 where there is none
    float* grad_x;        // this and the next two: null where not wanted
    float* grad_z;
    float* grad_weight;
    float* kept_v;  // scratch [n] each, for the gates
    float* kept_sigmoid;
};

// v^ and, kept in scratch for the second pass, v and sigmoid(z). Returns mean(grad_v^ v^); adds to
// grad_weight.
template <Gate kGate>
HWY_INLINE float BackwardReduce(const BackwardGroup& a) {
    const DF d;
    const VF rstd = hn::Set(d, a.rstd);
    VF dot = hn::Zero(d);
    ForEachVector(d, a.n, [&](int64_t i, auto lanes) HWY_ATTR {
        VF v = Load(d, a.x + i, lanes), grad = Load(d, a.grad_y + i, lanes);
        if constexpr (kGate != Gate::none) {
            const VF z = Load(d, a.z + i, lanes), sigmoid = Sigmoid(d, z), gate = hn::Mul(z, sigmoid);
            Store(d, sigmoid, a.kept_sigmoid + i, lanes);
            if constexpr (kGate == Gate::before) {
                v = hn::Mul(v, gate);
                Store(d, v, a.kept_v + i, lanes);
            } else {
                grad = hn::Mul(grad, gate);
            }
        }
        const VF product = hn::Mul(grad, hn::Mul(v, rstd));
        if (a.grad_weight != nullptr) {
            Store(d, hn::Add(Load(d, a.grad_weight + i, lanes), product), a.grad_weight + i, lanes);
        }
        dot = hn::MulAdd(product, Load(d, a.weight + i, lanes), dot);
    });
    return hn::GetLane(hn::SumOfLanes(d, dot)) / static_cast<float>(a.n);
}

template <class V>
HWY_INLINE void AddTo(float* p, V v, auto lanes) {
    const DF d;
    Store(d, hn::Add(Load(d, p, lanes), v), p, lanes);
}

// grad_v = rstd (grad_v^ - v^ mean), passed on to x and z.
template <Gate kGate>
HWY_INLINE void BackwardApply(const BackwardGroup& a, float mean) {
    const DF d;
    const VF rstd = hn::Set(d, a.rstd), means = hn::Set(d, mean), one = hn::Set(d, 1.0f);
    ForEachVector(d, a.n, [&](int64_t i, auto lanes) HWY_ATTR {
        const VF x = Load(d, a.x + i, lanes);
        const VF grad = hn::Mul(Load(d, a.grad_y + i, lanes), Load(d, a.weight + i, lanes));
        if constexpr (kGate == Gate::none) {
            const VF grad_v = hn::Mul(rstd, hn::NegMulAdd(hn::Mul(x, rstd), means, grad));
            AddTo(a.grad_x + i, grad_v, lanes);
        } else {
            const VF z = Load(d, a.z + i, lanes), s = Load(d, a.kept_sigmoid + i, lanes);
            const VF gate = hn::Mul(z, s);
            const VF gate_slope = hn::Mul(s, hn::MulAdd(z, hn::Sub(one, s), one));
            if constexpr (kGate == Gate::before) {
                const VF v_hat = hn::Mul(Load(d, a.kept_v + i, lanes), rstd);
                const VF grad_v = hn::Mul(rstd, hn::NegMulAdd(v_hat, means, grad));
                if (a.grad_x != nullptr) AddTo(a.grad_x + i, hn::Mul(grad_v, gate), lanes);
                if (a.grad_z != nullptr) AddTo(a.grad_z + i, hn::Mul(hn::Mul(grad_v, x), gate_slope), lanes);
            } else {
                const VF v_hat = hn::Mul(x, rstd);
                const VF grad_v = hn::Mul(rstd, hn::NegMulAdd(v_hat, means, hn::Mul(grad, gate)));
                if (a.grad_x != nullptr) AddTo(a.grad_x + i, grad_v, lanes);
                if (a.grad_z != nullptr)
                    AddTo(a.grad_z + i, hn::Mul(hn::Mul(grad, v_hat), gate_slope), lanes);
            }
        }
    });
}

// Rows begin .. end; grad_weight: [d], added to, or null; scratch: 2 d floats.
template <Gate kGate>
HWY_INLINE void BackwardRows(const RmsNormBackwardCall<float, float>& call, const float* weight,
                             float* grad_weight, float* scratch, int64_t begin, int64_t end) {
    const int64_t groups = call.options.groups, n = call.in.x.shape[1] / groups;
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t c = g * n;
            const BackwardGroup group{n,
                                      call.rstd.row(t)[g],
                                      call.in.x.row(t) + c,
                                      call.in.z ? call.in.z.row(t) + c : nullptr,
                                      call.grad_y.row(t) + c,
                                      weight + c,
                                      call.grad.x ? call.grad.x.row(t) + c : nullptr,
                                      call.grad.z ? call.grad.z.row(t) + c : nullptr,
                                      grad_weight != nullptr ? grad_weight + c : nullptr,
                                      scratch,
                                      scratch + n};
            const float mean = BackwardReduce<kGate>(group);
            if (call.grad.x && call.grad.set_x) std::fill_n(group.grad_x, n, 0.0f);
            if (call.grad.z && call.grad.set_z) std::fill_n(group.grad_z, n, 0.0f);
            if (call.grad.x || call.grad.z) BackwardApply<kGate>(group, mean);
            if (call.grad.branch) std::copy_n(group.grad_x, n, call.grad.branch.row(t) + c);
        }
    }
}

void Backward(const RmsNormBackwardCall<float, float>& call, const float* weight, float* grad_weight,
              float* scratch, int64_t begin, int64_t end) {
    switch (call.options.gate) {
        case Gate::none: return BackwardRows<Gate::none>(call, weight, grad_weight, scratch, begin, end);
        case Gate::before: return BackwardRows<Gate::before>(call, weight, grad_weight, scratch, begin, end);
        case Gate::after: return BackwardRows<Gate::after>(call, weight, grad_weight, scratch, begin, end);
    }
}

// Highway dispatches plain functions, one for each pair of types.
void ForwardF32F32(const RmsNormCall<float, float>& call, float* scratch, int64_t begin, int64_t end) {
    ForwardRows(call, scratch, begin, end);
}
void ForwardF32Bf16(const RmsNormCall<float, bf16>& call, float* scratch, int64_t begin, int64_t end) {
    ForwardRows(call, scratch, begin, end);
}
void ForwardBf16Bf16(const RmsNormCall<bf16, bf16>& call, float* scratch, int64_t begin, int64_t end) {
    ForwardRows(call, scratch, begin, end);
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::cpu {
namespace {

HWY_EXPORT(ForwardF32F32);
HWY_EXPORT(ForwardF32Bf16);
HWY_EXPORT(ForwardBf16Bf16);
HWY_EXPORT(Backward);

// A thread is worth waking for this many elements (measured: README.md).
constexpr int64_t kGrainElements = 32768;
// Rows whose weight gradients are summed one after another; fixed by t alone, so that the sum is the same
// on any number of threads.
constexpr int64_t kMinBlockRows = 32, kMaxBlocks = 128;

template <class X, class Y>
auto forward_kernel() {
    if constexpr (std::is_same_v<X, bf16>)
        return HWY_DYNAMIC_DISPATCH(ForwardBf16Bf16);
    else if constexpr (std::is_same_v<Y, bf16>)
        return HWY_DYNAMIC_DISPATCH(ForwardF32Bf16);
    else
        return HWY_DYNAMIC_DISPATCH(ForwardF32F32);
}
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormCall<X, Y>& call) {
    const int64_t t = call.in.x.shape[0], d = call.in.x.shape[1];
    const auto kernel = forward_kernel<X, Y>();
    const int64_t small = std::max<int64_t>(1, kGrainElements / d);
    if (call.options.gate != RmsNormOptions::Gate::before) {
        parallel_for(ex, t, small, [&](int64_t begin, int64_t end) { kernel(call, nullptr, begin, end); });
        return;
    }
    // At most ex.threads ranges, so that range number begin / grain names a scratch row.
    const int64_t grain = std::max(small, divide_up(t, ex.threads));
    const Scratch<float> scratch(ex, static_cast<size_t>(divide_up(t, grain) * d));
    parallel_for(ex, t, grain, [&](int64_t begin, int64_t end) {
        kernel(call, scratch.data() + begin / grain * d, begin, end);
    });
}

void rms_norm_backward(const Exec& ex, const RmsNormBackwardCall<float, float>& call) {
    const int64_t t = call.in.x.shape[0], d = call.in.x.shape[1];
    const auto kernel = HWY_DYNAMIC_DISPATCH(Backward);
    const int64_t block_rows = std::max(kMinBlockRows, divide_up(t, kMaxBlocks));
    const int64_t blocks = divide_up(t, block_rows);
    const int64_t grain = std::max(divide_up(kGrainElements, block_rows * d), divide_up(blocks, ex.threads));
    const int64_t ranges = divide_up(blocks, grain);

    const Scratch<float> weight(ex, static_cast<size_t>(d));
    const float offset = call.options.unit_offset ? 1.0f : 0.0f;
    for (int64_t i = 0; i < d; ++i) {
        weight[static_cast<size_t>(i)] = call.in.weight ? call.in.weight.data[i] + offset : 1.0f;
    }
    const Scratch<float> rows(ex, static_cast<size_t>(2 * d * ranges));
    const Scratch<float> partial(ex, call.grad.weight ? static_cast<size_t>(blocks * d) : 0);
    parallel_for(ex, blocks, grain, [&](int64_t begin, int64_t end) {
        float* scratch = rows.data() + begin / grain * 2 * d;
        for (int64_t b = begin; b < end; ++b) {
            float* sum = call.grad.weight ? partial.data() + b * d : nullptr;
            if (sum != nullptr) std::fill(sum, sum + d, 0.0f);
            kernel(call, weight.data(), sum, scratch, b * block_rows, std::min(t, (b + 1) * block_rows));
        }
    });
    if (!call.grad.weight) return;
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < d; ++i) call.grad.weight.data[i] += partial.data()[b * d + i];
    }
}

template void rms_norm(const Exec&, const RmsNormCall<float, float>&);
template void rms_norm(const Exec&, const RmsNormCall<float, bf16>&);
template void rms_norm(const Exec&, const RmsNormCall<bf16, bf16>&);

}  // namespace ssm::cpu
#endif  // HWY_ONCE
