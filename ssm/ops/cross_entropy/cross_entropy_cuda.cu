// The loss of a linear head on a GPU: a tile of logits by cuBLASLt in f32, a pass over its rows that leaves
// the gradient in place (f32) or beside it (bf16, what the next products read), and the two gradients'
// products.
#include <algorithm>
#include <optional>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
#include "ssm/ops/linear/linear_impl.h"

namespace ssm::cuda {
namespace {

using linear_detail::Matrix;

constexpr std::string_view kOp = "linear_cross_entropy";
constexpr int kPack = 4, kLoads = 4;
// Threads of a row. A long row is read twice, the second time from the L2 cache: so one block a
// multiprocessor.
constexpr int kThreadsShort = 128, kThreadsLong = 1024;
constexpr int64_t kShortRow = 4096;

struct Params {
    int64_t v, stride;       // of logits and gradients; rows are aligned to packs
    const float* logits;     // [rows v]
    void* gradients;         // [rows v]
    const int32_t* targets;  // [rows]
    const float* grad_nll;   // [rows]
    float* nll;              // [rows]
};

constexpr float kNone = -INFINITY;

// The largest of some numbers and the sum of e^(x - largest).
struct Sum {
    float m = kNone, s = 0.0f;
};
// What a maximum is subtracted as: -inf - -inf would be NaN.
__device__ inline float base_of(float m) { return m == kNone ? 0.0f : m; }

// a's sum below the maximum m >= a.m. Of nothing but -inf it is 0 (or NaN, which stays).
__device__ inline Sum merge(const Sum& a, float m) { return {m, a.m == kNone ? a.s : a.s * __expf(a.m - m)}; }

// Over the block, in every thread, in a fixed order.
template <int Threads>
__device__ inline Sum merge_block(Sum x) {
    __shared__ float maxima[kWarp], sums[kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = merge(x, warp_max(x.m));
    x.s = warp_sum(x.s);
    if (lane == 0) maxima[warp] = x.m, sums[warp] = x.s;
    __syncthreads();
    constexpr int kWarps = Threads / kWarp;
    x = lane < kWarps ? Sum{maxima[lane], sums[lane]} : Sum{};
    x = merge(x, warp_max(x.m));
    x.s = warp_sum(x.s);
    return x;
}

// Past the row: -inf.
__device__ inline Pack<float, kPack> load_logits(const float* row, int64_t j, int64_t v) {
    Pack<float, kPack> x{{kNone, kNone, kNone, kNone}};
    if (j < v) x = load_pack<kPack>(row + j);
    if (j + kPack > v) {
#pragma unroll
        for (int k = 0; k < kPack; ++k)
            if (j + k >= v) x.at[k] = kNone;
    }
    return x;
}

template <int Threads>
__device__ inline Sum sum_row(const float* row, int64_t v) {
    Sum sum;
    for (int64_t base = threadIdx.x * kPack; base < v; base += Threads * kPack * kLoads) {
        Pack<float, kPack> x[kLoads];
        float m = sum.m;
#pragma unroll
        for (int u = 0; u < kLoads; ++u) x[u] = load_logits(row, base + u * Threads * kPack, v);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
#pragma unroll
            for (int k = 0; k < kPack; ++k) m = fmaxf(m, x[u].at[k]);
        }
        if (m != sum.m) sum = merge(sum, m);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
#pragma unroll
            for (int k = 0; k < kPack; ++k) sum.s += __expf(x[u].at[k] - base_of(m));
        }
    }
    return merge_block<Threads>(sum);
}

// G: the gradients' type; void: nll alone.
template <class G, int Threads>
__global__ void __launch_bounds__(Threads) Rows(const __grid_constant__ Params p) {
    const int64_t r = blockIdx.x;
    const float* row = p.logits + r * p.stride;
    const int64_t target = p.targets[r];
    const bool counts = target >= 0 && target < p.v;
    const float x_target = counts ? row[target] : 0.0f;  // read before it is written over
    const Sum sum = sum_row<Threads>(row, p.v);
    const bool good = fabsf(sum.m) < INFINITY && !isnan(sum.s);
    if (threadIdx.x == 0)
        p.nll[r] = target < 0 ? 0.0f : !counts || !good ? nanf("") : (sum.m - x_target) + logf(sum.s);
    if constexpr (!std::is_void_v<G>) {
        const float g = p.grad_nll[r], scale = !counts ? 0.0f : good ? g / sum.s : nanf("");
        G* out = static_cast<G*>(p.gradients) + r * p.stride;
        for (int64_t base = threadIdx.x * kPack; base < p.v; base += Threads * kPack * kLoads) {
            Pack<float, kPack> x[kLoads];
#pragma unroll
            for (int u = 0; u < kLoads; ++u) x[u] = load_logits(row, base + u * Threads * kPack, p.v);
#pragma unroll
            for (int u = 0; u < kLoads; ++u) {
                const int64_t j = base + u * Threads * kPack;
                Pack<G, kPack> y;
#pragma unroll
                for (int k = 0; k < kPack; ++k) {
                    const float e = counts ? __expf(x[u].at[k] - sum.m) * scale : 0.0f;
                    y.at[k] = from_float<G>(counts && j + k == target ? e - g : e);
                }
                if (j < p.v) store_pack(out + j, y);
            }
        }
    }
}

template <class G>
void rows(const Exec& ex, const Params& p, int64_t count) {
    const auto blocks = static_cast<unsigned>(count);
    if (p.v <= kShortRow) {
        Rows<G, kThreadsShort><<<blocks, kThreadsShort, 0, stream_of(ex)>>>(p);
    } else {
        Rows<G, kThreadsLong><<<blocks, kThreadsLong, 0, stream_of(ex)>>>(p);
    }
    check_launch(kOp);
}

int64_t padded(int64_t columns) { return (columns + 7) / 8 * 8; }

// Tokens of a tile: tiles of nearly equal size, in whole blocks of a product's rows where there are several.
int64_t rows_of_tile(int64_t t, int64_t v, int64_t bytes) {
    constexpr int64_t kBlock = 128;
    const int64_t most = std::max<int64_t>(1, bytes / (4 * padded(v)));
    const int64_t tiles = (t + most - 1) / most, even = (t + tiles - 1) / tiles;
    const int64_t whole = (even + kBlock - 1) / kBlock * kBlock;
    return tiles > 1 && whole <= most ? whole : even;
}

// v, or its copy rounded to bf16 with aligned rows.
Matrix operand(const Exec& ex, View<const float, 2> v, std::optional<Scratch<bf16>>& rounded) {
    const Matrix m{v.data, DType::f32, v.stride, false};
    if (ex.matmul != MatmulPrecision::bf16) return m;
    const int64_t stride = padded(v.shape[1]);
    rounded.emplace(ex, static_cast<size_t>(v.shape[0] * stride));
    cuda::convert_rows(ex, v.shape[0], v.shape[1], m, rounded->data(), DType::bf16, stride);
    return {rounded->data(), DType::bf16, stride, false};
}

Matrix rows_from(Matrix m, int64_t row) {
    m.data = static_cast<const std::byte*>(m.data) + row * m.stride * static_cast<int64_t>(size_of(m.dtype));
    return m;
}
Matrix transposed(Matrix m) {
    m.transpose = true;
    return m;
}

}  // namespace

void linear_cross_entropy(const Exec& ex, const Tensor& hidden, const PackedWeight& weight,
                          View<const int32_t, 1> targets, View<float, 1> nll, int64_t tile_bytes) {
    const int64_t t = hidden.dim(0), v = weight.weight().dim(0), stride = padded(v);
    const int64_t tile = rows_of_tile(t, v, tile_bytes);
    const Tensor logits = Tensor::empty(ex, {tile, stride}), real = logits.columns(0, v);
    const auto* data = logits.view<const float, 2>().data;
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t count = std::min(tile, t - at);
        linear(ex, hidden.rows(at, at + count), weight, {}, real.rows(0, count));
        rows<void>(ex, {v, stride, data, nullptr, targets.data + at, nullptr, nll.data + at}, count);
    }
}

void linear_cross_entropy_backward(const Exec& ex, View<const float, 2> hidden, View<const float, 2> weight,
                                   View<const int32_t, 1> targets, View<const float, 1> grad_nll,
                                   View<float, 1> nll, View<float, 2> grad_hidden, View<float, 2> grad_weight,
                                   int64_t tile_bytes) {
    const int64_t t = hidden.shape[0], e = hidden.shape[1], v = weight.shape[0], stride = padded(v);
    const int64_t tile = rows_of_tile(t, v, tile_bytes);
    const bool round = ex.matmul == MatmulPrecision::bf16;
    std::optional<Scratch<bf16>> hidden_copy, weight_copy, rounded;
    const Matrix h = operand(ex, hidden, hidden_copy), w = operand(ex, weight, weight_copy);
    const Scratch<float> logits(ex, static_cast<size_t>(tile * stride));
    if (round) rounded.emplace(ex, static_cast<size_t>(tile * stride));
    const Matrix g = round ? Matrix{rounded->data(), DType::bf16, stride, false}
                           : Matrix{logits.data(), DType::f32, stride, false};
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t count = std::min(tile, t - at);
        const Matrix x = rows_from(h, at);
        product(
            ex,
            {.m = count, .n = v, .k = e, .a = x, .b = transposed(w), .c = logits.data(), .c_stride = stride});
        const Params p{v,
                       stride,
                       logits.data(),
                       const_cast<void*>(g.data),
                       targets.data + at,
                       grad_nll.data + at,
                       nll.data + at};
        round ? rows<bf16>(ex, p, count) : rows<float>(ex, p, count);
        if (grad_hidden)
            product(ex, {.m = count,
                         .n = e,
                         .k = v,
                         .a = g,
                         .b = w,
                         .c = grad_hidden.row(at),
                         .c_stride = grad_hidden.stride,
                         .beta = 1.0f});
        if (grad_weight)
            product(ex, {.m = v,
                         .n = e,
                         .k = count,
                         .a = transposed(g),
                         .b = x,
                         .c = grad_weight.data,
                         .c_stride = grad_weight.stride,
                         .beta = 1.0f});
    }
}

}  // namespace ssm::cuda
