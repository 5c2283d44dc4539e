// The causal convolution on the CPU: channels in lanes, a few tokens at a time. See README.md.
#include "ssm/ops/causal_conv1d/causal_conv1d_impl.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/causal_conv1d/causal_conv1d_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ssm/core/simd_io-inl.h"
#include "ssm/core/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, 16>;
using Vec = hn::Vec<Tag>;
constexpr int64_t kLanes = hn::MaxLanes(Tag());
constexpr int64_t kTile = 64;       // tokens of a unit of work
constexpr int64_t kBackTile = 16;   // tokens of a tile of the backward pass
constexpr int64_t kFastWidth = 4;   // the convolution width of every released Mamba
constexpr int64_t kFastTokens = 4;  // outputs made from the same loads

// The inputs of a call by their position in a sequence: rows before its start are the initial state or zero.
template <class T>
struct Rows {
    const CausalConv1dInputs<T>& in;
    std::vector<T> zero;  // [d]

    explicit Rows(const CausalConv1dInputs<T>& inputs)
        : in(inputs), zero(static_cast<size_t>(inputs.x.shape[1]), T()) {}
    int64_t history() const { return in.weight.shape[1] - 1; }
    // Position p >= -(k-1) of sequence s.
    const T* at(int64_t s, int64_t p) const noexcept {
        if (p >= 0) return in.x.row(in.cu_seqlens[s] + p);
        return in.initial_state ? in.initial_state.row(s) + (history() + p) * in.x.shape[1] : zero.data();
    }
};

// weight [d k] -> [k d]
void TransposeWeight(View<const float, 2> weight, float* out) noexcept {
    const int64_t d = weight.shape[0], k = weight.shape[1];
    for (int64_t c = 0; c < d; ++c) {
        for (int64_t j = 0; j < k; ++j) out[j * d + c] = weight.row(c)[j];
    }
}

HWY_INLINE Vec Activate(Activation activation, Vec v) {
    return activation == Activation::silu ? Silu(Tag(), v) : v;
}

template <class Lanes>
HWY_INLINE Vec BiasOr0(View<const float, 1> bias, int64_t c, Lanes lanes) {
    return bias ? Load(Tag(), bias.data + c, lanes) : hn::Zero(Tag());
}

// One token: x[j] is the row that meets tap j. weight is [k d].
template <class T>
void OneToken(const CausalConv1dInputs<T>& in, const float* weight, const T* const* x, T* y) noexcept {
    const Tag tag;
    const int64_t d = in.x.shape[1], k = in.weight.shape[1];
    ForEachVector(tag, d, [&](int64_t c, auto lanes) HWY_ATTR {
        Vec sum = BiasOr0(in.bias, c, lanes);
        for (int64_t j = 0; j < k; ++j) {
            sum = hn::MulAdd(Load(tag, weight + j * d + c, lanes), Load(tag, x[j] + c, lanes), sum);
        }
        Store(tag, Activate(in.activation, sum), y + c, lanes);
    });
}

// Four tokens of width 4: seven rows are loaded once. y[i] is the row of token i.
template <class T>
void FourTokens(const CausalConv1dInputs<T>& in, const float* weight, const T* const* x,
                T* const* y) noexcept {
    const Tag tag;
    const int64_t d = in.x.shape[1];
    ForEachVector(tag, d, [&](int64_t c, auto lanes) HWY_ATTR {
        const Vec bias = BiasOr0(in.bias, c, lanes);
        const Vec w0 = Load(tag, weight + c, lanes), w1 = Load(tag, weight + d + c, lanes);
        const Vec w2 = Load(tag, weight + 2 * d + c, lanes), w3 = Load(tag, weight + 3 * d + c, lanes);
        Vec a = Load(tag, x[0] + c, lanes), b = Load(tag, x[1] + c, lanes), e = Load(tag, x[2] + c, lanes);
        for (int64_t i = 0; i < kFastTokens; ++i) {
            const Vec current = Load(tag, x[i + 3] + c, lanes);
            const Vec older = hn::MulAdd(w1, b, hn::MulAdd(w0, a, bias));
            const Vec sum = hn::MulAdd(w3, current, hn::MulAdd(w2, e, older));
            Store(tag, Activate(in.activation, sum), y[i] + c, lanes);
            a = b, b = e, e = current;
        }
    });
}

// Positions begin .. end of sequence s.
template <class T>
void Tokens(const Rows<T>& rows, const float* weight, View<T, 2> y, int64_t s, int64_t begin, int64_t end,
            std::vector<const T*>& x) noexcept {
    const int64_t k = rows.in.weight.shape[1], base = rows.in.cu_seqlens[s];
    for (int64_t p = begin; p < end;) {
        const bool fast = k == kFastWidth && end - p >= kFastTokens;
        const int64_t count = fast ? kFastTokens : 1;
        for (int64_t j = 0; j < k - 1 + count; ++j) x[j] = rows.at(s, p - k + 1 + j);
        if (fast) {
            T* const out[kFastTokens] = {y.row(base + p), y.row(base + p + 1), y.row(base + p + 2),
                                         y.row(base + p + 3)};
            FourTokens(rows.in, weight, x.data(), out);
        } else {
            OneToken(rows.in, weight, x.data(), y.row(base + p));
        }
        p += count;
    }
}

// The last k-1 inputs; where final_state is initial_state, rows move towards the front, so in order.
template <class T>
void SaveState(const Rows<T>& rows, int64_t s, View<T, 3> final_state) noexcept {
    const int64_t d = rows.in.x.shape[1], length = rows.in.cu_seqlens[s + 1] - rows.in.cu_seqlens[s];
    for (int64_t i = 0; i < rows.history(); ++i) {
        std::memmove(final_state.row(s) + i * d, rows.at(s, length - rows.history() + i), d * sizeof(T));
    }
}

template <class T>
void Sequence(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 2> y, View<T, 3> final_state) {
    const Rows<T> rows(in);
    const int64_t d = in.x.shape[1], k = in.weight.shape[1];
    const int64_t s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    Scratch<float> weight(ex, static_cast<size_t>(d * k));
    TransposeWeight(in.weight, weight.data());
    std::vector<int64_t> first{0};  // tile of each sequence
    for (int64_t i = 0; i < s; ++i) {
        first.push_back(first.back() + (in.cu_seqlens[i + 1] - in.cu_seqlens[i] + kTile - 1) / kTile);
    }
    parallel_for(ex, first.back(), 1, [&](int64_t begin, int64_t end) {
        std::vector<const T*> x(static_cast<size_t>(k - 1 + kFastTokens));
        int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t tile = begin; tile < end; ++tile) {
            while (tile >= first[i + 1]) ++i;
            const int64_t from = (tile - first[i]) * kTile, length = in.cu_seqlens[i + 1] - in.cu_seqlens[i];
            Tokens(rows, weight.data(), y, i, from, std::min(from + kTile, length), x);
        }
    });
    for (int64_t i = 0; i < s && final_state; ++i) SaveState(rows, i, final_state);
}

// ---- backward ---------------------------------------------------------------------------------------------

HWY_INLINE Vec Slope(Activation activation, Vec v) {
    return activation == Activation::silu ? SiluDerivative(Tag(), v) : hn::Set(Tag(), 1.0f);
}

// What a block of channels keeps from tile to tile.
struct BlockMemory {
    float *weight, *grad_weight, *grad_bias;  // [k L], [k L], [L]
    float* g;  // [k-1+max(kBackTile, k-1) L]: of the k-1 positions before the tile, then of the tile

    static int64_t size(int64_t k) { return (3 * k + std::max(kBackTile, k - 1)) * kLanes; }
    BlockMemory(float* p, int64_t k)
        : weight(p), grad_weight(p + k * kLanes), grad_bias(p + 2 * k * kLanes), g(grad_bias + kLanes) {}
};

// One block of channels and a tile of time. With g = grad_y act'(y before act):
//   grad_x[p] = sum_j weight[j] g[p+k-1-j],   grad_weight[j] = sum_p g[p] x[p-k+1+j],   grad_bias = sum_p
//   g[p]
// kK is the width k where it is known at compile time, else 0.
template <int64_t kK, class Lanes>
struct BlockBackward {
    const Rows<float>& rows;
    View<const float, 2> grad_y;
    View<const float, 3> grad_final_state;
    const CausalConv1dGradients<float>& grad;
    int64_t c;
    Lanes lanes;
    const BlockMemory& memory;

    int64_t k() const { return kK > 0 ? kK : rows.in.weight.shape[1]; }

    // The rows of the next tile: no hardware prefetcher follows one cache line per row.
    HWY_INLINE void Prefetch(int64_t row) const noexcept {
        if (row >= rows.in.x.shape[0]) return;
        hwy::Prefetch(rows.in.x.row(row) + c);
        hwy::Prefetch(grad_y.row(row) + c);
        if (grad.x) hwy::Prefetch(grad.x.row(row) + c);
    }

    // The same as Outputs for a width known at compile time: weights, sums and the last inputs in registers.
    void OutputsFast(int64_t s, int64_t begin, int64_t end) noexcept {
        constexpr size_t kWidth = kK > 0 ? kK : 1;
        const Tag tag;
        const Vec bias = BiasOr0(rows.in.bias, c, lanes);
        Vec bias_sum = hn::Load(tag, memory.grad_bias);
        Vec w[kWidth], sum[kWidth], x[kWidth];  // x[j] meets tap j
        for (size_t j = 0; j < kWidth; ++j) {
            w[j] = hn::Load(tag, memory.weight + j * kLanes);
            sum[j] = hn::Load(tag, memory.grad_weight + j * kLanes);
            if (j > 0) x[j] = Load(tag, rows.at(s, begin - kK + static_cast<int64_t>(j)) + c, lanes);
        }
        for (int64_t p = begin; p < end; ++p) {
            const int64_t row = rows.in.cu_seqlens[s] + p;
            Prefetch(row + kBackTile);
            for (size_t j = 0; j + 1 < kWidth; ++j) x[j] = x[j + 1];
            x[kWidth - 1] = Load(tag, rows.in.x.row(row) + c, lanes);
            Vec before = bias;
            for (size_t j = 0; j < kWidth; ++j) before = hn::MulAdd(w[j], x[j], before);
            const Vec slope = Slope(rows.in.activation, before);
            const Vec out = hn::Mul(Load(tag, grad_y.row(row) + c, lanes), slope);
            for (size_t j = 0; j < kWidth; ++j) sum[j] = hn::MulAdd(out, x[j], sum[j]);
            bias_sum = hn::Add(bias_sum, out);
            hn::Store(out, tag, memory.g + (k() - 1 + p - begin) * kLanes);
        }
        hn::Store(bias_sum, tag, memory.grad_bias);
        for (size_t j = 0; j < kWidth; ++j) hn::Store(sum[j], tag, memory.grad_weight + j * kLanes);
    }

    // g of positions begin .. end, and the sums over time.
    void Outputs(int64_t s, int64_t begin, int64_t end) noexcept {
        const Tag tag;
        const Vec bias = BiasOr0(rows.in.bias, c, lanes);
        const int64_t base = rows.in.cu_seqlens[s];
        for (int64_t p = begin; p < end; ++p) {
            Vec before = bias;
            for (int64_t j = 0; j < k(); ++j) {
                const Vec x = Load(tag, rows.at(s, p - k() + 1 + j) + c, lanes);
                before = hn::MulAdd(hn::Load(tag, memory.weight + j * kLanes), x, before);
            }
            const Vec slope = Slope(rows.in.activation, before);
            const Vec out = hn::Mul(Load(tag, grad_y.row(base + p) + c, lanes), slope);
            for (int64_t j = 0; j < k(); ++j) {
                const Vec x = Load(tag, rows.at(s, p - k() + 1 + j) + c, lanes);
                float* sum = memory.grad_weight + j * kLanes;
                hn::Store(hn::MulAdd(out, x, hn::Load(tag, sum)), tag, sum);
            }
            hn::Store(hn::Add(hn::Load(tag, memory.grad_bias), out), tag, memory.grad_bias);
            hn::Store(out, tag, memory.g + (k() - 1 + p - begin) * kLanes);
        }
    }

    // The gradient row of position p: of x, or of the initial state.
    float* InputRow(int64_t s, int64_t p) const noexcept {
        if (p >= 0) return grad.x ? grad.x.row(rows.in.cu_seqlens[s] + p) : nullptr;
        const int64_t i = k() - 1 + p;
        return grad.initial_state ? grad.initial_state.row(s) + i * rows.in.x.shape[1] : nullptr;
    }

    // The gradients of count positions from p on, whose g lies at the front of `g`.
    void Inputs(int64_t s, int64_t p, int64_t count) noexcept {
        const Tag tag;
        for (int64_t i = 0; i < count; ++i) {
            float* row = InputRow(s, p + i);
            if (row == nullptr) continue;
            Vec sum = grad.set_x && p + i >= 0 ? hn::Zero(tag) : Load(tag, row + c, lanes);
            for (int64_t j = 0; j < k(); ++j) {
                const Vec out = hn::Load(tag, memory.g + (i + k() - 1 - j) * kLanes);
                sum = hn::MulAdd(hn::Load(tag, memory.weight + j * kLanes), out, sum);
            }
            Store(tag, sum, row + c, lanes);
        }
    }

    // Tokens p .. p + count of sequence s; their g is known only now, so inputs lag by k-1.
    void Tile(int64_t s, int64_t p, int64_t count) noexcept {
        const int64_t history = (k() - 1) * kLanes;
        if (p == 0) std::fill_n(memory.g, history, 0.0f);
        if constexpr (kK > 0) {
            OutputsFast(s, p, p + count);
        } else {
            Outputs(s, p, p + count);
        }
        Inputs(s, p - k() + 1, count);
        std::memmove(memory.g, memory.g + count * kLanes, static_cast<size_t>(history) * sizeof(float));
    }

    // The last k-1 inputs of sequence s, which are also its final state.
    void EndOfSequence(int64_t s) noexcept {
        const Tag tag;
        const int64_t length = rows.in.cu_seqlens[s + 1] - rows.in.cu_seqlens[s], history = k() - 1;
        if (length == 0) std::fill_n(memory.g, history * kLanes, 0.0f);
        std::fill_n(memory.g + history * kLanes, history * kLanes, 0.0f);  // nothing after the end
        Inputs(s, length - history, history);
        for (int64_t i = 0; i < history && grad_final_state; ++i) {
            float* row = InputRow(s, length - history + i);
            if (row == nullptr) continue;
            const Vec out = Load(tag, grad_final_state.row(s) + i * rows.in.x.shape[1] + c, lanes);
            Store(tag, hn::Add(Load(tag, row + c, lanes), out), row + c, lanes);
        }
    }

    void Begin() noexcept {
        std::fill_n(memory.weight, BlockMemory::size(k()), 0.0f);
        for (int64_t i = 0; i < std::min(kLanes, rows.in.x.shape[1] - c); ++i) {
            for (int64_t j = 0; j < k(); ++j) memory.weight[j * kLanes + i] = rows.in.weight.row(c + i)[j];
        }
    }
    void End() noexcept {
        for (int64_t i = 0; i < std::min(kLanes, rows.in.x.shape[1] - c); ++i) {
            for (int64_t j = 0; j < k() && grad.weight; ++j) {
                grad.weight.row(c + i)[j] += memory.grad_weight[j * kLanes + i];
            }
            if (grad.bias) grad.bias.data[c + i] += memory.grad_bias[i];
        }
    }
};

void Gradients(const Exec& ex, const CausalConv1dInputs<float>& in, View<const float, 2> grad_y,
               View<const float, 3> grad_final_state, const CausalConv1dGradients<float>& grad) {
    const Rows<float> rows(in);
    const int64_t d = in.x.shape[1], k = in.weight.shape[1];
    // Channels over threads; in each, tiles of time through all blocks, so that rows are read along.
    parallel_for(ex, (d + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
        Scratch<float> scratch(ex, static_cast<size_t>((end - begin) * BlockMemory::size(k)));
        auto for_each_block = [&](auto&& f) {
            for (int64_t b = begin; b < end; ++b) {
                const BlockMemory memory(scratch.data() + (b - begin) * BlockMemory::size(k), k);
                auto run = [&]<int64_t kK>(std::integral_constant<int64_t, kK>, auto lanes) {
                    f(BlockBackward<kK, decltype(lanes)>{rows, grad_y, grad_final_state, grad, b * kLanes,
                                                         lanes, memory});
                };
                if ((b + 1) * kLanes > d) {
                    run(std::integral_constant<int64_t, 0>(), SomeLanes{d - b * kLanes});
                } else if (k == kFastWidth) {
                    run(std::integral_constant<int64_t, kFastWidth>(), AllLanes{});
                } else {
                    run(std::integral_constant<int64_t, 0>(), AllLanes{});
                }
            }
        };
        for_each_block([](auto block) { block.Begin(); });
        for (size_t i = 0; i + 1 < in.cu_seqlens.size(); ++i) {
            const int64_t s = static_cast<int64_t>(i), length = in.cu_seqlens[i + 1] - in.cu_seqlens[i];
            for (int64_t p = 0; p < length; p += kBackTile) {
                const int64_t count = std::min(kBackTile, length - p);
                for_each_block([&](auto block) { block.Tile(s, p, count); });
            }
            for_each_block([&](auto block) { block.EndOfSequence(s); });
        }
        for_each_block([](auto block) { block.End(); });
    });
}

// ---- step -------------------------------------------------------------------------------------------------

// weight[c .. c + L, j] for all j, channels in lanes.
template <class Lanes>
HWY_INLINE void GatherTaps(View<const float, 2> weight, int64_t c, Lanes, float* taps) {
    const int64_t k = weight.shape[1], channels = std::min(kLanes, weight.shape[0] - c);
    if (std::is_same_v<Lanes, AllLanes> && k == kFastWidth && weight.dense()) {
        const Tag tag;
        Vec w0, w1, w2, w3;
        hn::LoadInterleaved4(tag, weight.row(c), w0, w1, w2, w3);
        hn::Store(w0, tag, taps), hn::Store(w1, tag, taps + kLanes);
        hn::Store(w2, tag, taps + 2 * kLanes), hn::Store(w3, tag, taps + 3 * kLanes);
        return;
    }
    std::fill_n(taps, k * kLanes, 0.0f);
    for (int64_t i = 0; i < channels; ++i) {
        for (int64_t j = 0; j < k; ++j) taps[j * kLanes + i] = weight.row(c + i)[j];
    }
}

template <class T>
void Step(const Exec& ex, const CausalConv1dInputs<T>& in, View<T, 3> state, View<T, 2> y) {
    const Tag tag;
    const int64_t d = in.x.shape[1], k = in.weight.shape[1];
    Scratch<float> scratch(ex, static_cast<size_t>(k * kLanes));
    float* taps = scratch.data();
    ForEachVector(tag, d, [&](int64_t c, auto lanes) HWY_ATTR {
        GatherTaps(in.weight, c, lanes, taps);
        for (int64_t s = 0; s < in.x.shape[0]; ++s) {
            Vec sum = BiasOr0(in.bias, c, lanes);
            for (int64_t j = 0; j < k; ++j) {
                T* old = j < k - 1 ? state.row(s) + j * d + c : nullptr;
                const Vec x = Load(tag, old != nullptr ? old : in.x.row(s) + c, lanes);
                sum = hn::MulAdd(hn::Load(tag, taps + j * kLanes), x, sum);
                if (j > 0) Store(tag, x, state.row(s) + (j - 1) * d + c, lanes);
            }
            Store(tag, Activate(in.activation, sum), y.row(s) + c, lanes);
        }
    });
}

void SequenceF32(const Exec& ex, const CausalConv1dInputs<float>& in, View<float, 2> y,
                 View<float, 3> final_state) {
    Sequence(ex, in, y, final_state);
}
void SequenceBf16(const Exec& ex, const CausalConv1dInputs<bf16>& in, View<bf16, 2> y,
                  View<bf16, 3> final_state) {
    Sequence(ex, in, y, final_state);
}
void StepF32(const Exec& ex, const CausalConv1dInputs<float>& in, View<float, 3> state, View<float, 2> y) {
    Step(ex, in, state, y);
}
void StepBf16(const Exec& ex, const CausalConv1dInputs<bf16>& in, View<bf16, 3> state, View<bf16, 2> y) {
    Step(ex, in, state, y);
}

}  // namespace
}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(SequenceF32);
HWY_EXPORT(SequenceBf16);
HWY_EXPORT(Gradients);
HWY_EXPORT(StepF32);
HWY_EXPORT(StepBf16);

namespace cpu {

template <>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<float>& in, View<float, 2> y,
                   View<float, 3> final_state) {
    HWY_DYNAMIC_DISPATCH(SequenceF32)(ex, in, y, final_state);
}
template <>
void causal_conv1d(const Exec& ex, const CausalConv1dInputs<bf16>& in, View<bf16, 2> y,
                   View<bf16, 3> final_state) {
    HWY_DYNAMIC_DISPATCH(SequenceBf16)(ex, in, y, final_state);
}
template <>
void causal_conv1d_backward(const Exec& ex, const CausalConv1dInputs<float>& in, View<const float, 2> grad_y,
                            View<const float, 3> grad_final_state, const CausalConv1dGradients<float>& grad) {
    HWY_DYNAMIC_DISPATCH(Gradients)(ex, in, grad_y, grad_final_state, grad);
}
template <>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<float>& in, View<float, 3> state,
                        View<float, 2> y) {
    HWY_DYNAMIC_DISPATCH(StepF32)(ex, in, state, y);
}
template <>
void causal_conv1d_step(const Exec& ex, const CausalConv1dInputs<bf16>& in, View<bf16, 3> state,
                        View<bf16, 2> y) {
    HWY_DYNAMIC_DISPATCH(StepBf16)(ex, in, state, y);
}

}  // namespace cpu
}  // namespace ssm
#endif  // HWY_ONCE
