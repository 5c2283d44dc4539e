// The loss of a linear head on a GPU: a tile of logits by cuBLASLt in f32, a pass over its rows that leaves
// the gradient in its place (in f32, or in bf16, what the next products read, over the first half of a row),
// and the two gradients' products.
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
    int64_t v, stride;       // of logits; rows are aligned to packs
    float* logits;           // [rows v]; the gradients take their place
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

// What the gradient of a row is made of.
struct RowSlope {
    float m, scale, g;
    int64_t target;
    bool counts;
};

// The gradients of a row over its logits, which those in f32 simply replace. Those in bf16 take the first
// half of the row: what an iteration writes has been read in it or before, but by other threads, so the block
// waits for them. The next logits are read before these gradients are written.
template <class G, int Threads>
__device__ inline void write_slopes(const float* row, G* out, int64_t v, const RowSlope& s) {
    constexpr int kStep = Threads * kPack;
    Pack<float, kPack> x[kLoads], next[kLoads];
    const auto load = [&](Pack<float, kPack>* to, int64_t base) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) to[u] = load_logits(row, base + u * kStep, v);
    };
    load(x, threadIdx.x * kPack);
    for (int64_t first = 0; first < v; first += kStep * kLoads) {
        const int64_t base = first + threadIdx.x * kPack;
        if constexpr (sizeof(G) < sizeof(float)) __syncthreads();
        load(next, base + kStep * kLoads);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
            const int64_t j = base + u * kStep;
            Pack<G, kPack> y;
#pragma unroll
            for (int k = 0; k < kPack; ++k) {
                const float e = s.counts ? __expf(x[u].at[k] - s.m) * s.scale : 0.0f;
                y.at[k] = from_float<G>(s.counts && j + k == s.target ? e - s.g : e);
            }
            if (j < v) store_pack(out + j, y);
            x[u] = next[u];
        }
    }
}

// G: the gradients' type; void: nll alone.
template <class G, int Threads>
__global__ void __launch_bounds__(Threads) Rows(const __grid_constant__ Params p) {
    const int64_t r = blockIdx.x;
    float* row = p.logits + r * p.stride;
    const int64_t target = p.targets[r];
    const bool counts = target >= 0 && target < p.v;
    const float x_target = counts ? row[target] : 0.0f;  // read before it is written over
    const Sum sum = sum_row<Threads>(row, p.v);
    const bool good = fabsf(sum.m) < INFINITY && !isnan(sum.s);
    if (threadIdx.x == 0)
        p.nll[r] = target < 0 ? 0.0f : !counts || !good ? nanf("") : (sum.m - x_target) + logf(sum.s);
    if constexpr (!std::is_void_v<G>) {
        const float g = p.grad_nll[r], scale = !counts ? 0.0f : good ? g / sum.s : nanf("");
        write_slopes<G, Threads>(row, reinterpret_cast<G*>(row), p.v, {sum.m, scale, g, target, counts});
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

// One block: sums of its threads, then over them by halves.
__global__ void __launch_bounds__(kThreadsLong)
    Mean(const float* nll, int64_t count, double counted, float* mean) {
    __shared__ double sums[kThreadsLong];
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += kThreadsLong) sum += double{nll[i]};
    sums[threadIdx.x] = sum;
    for (int half = kThreadsLong / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *mean = static_cast<float>(sums[0] / counted);
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

// m in `dtype`: itself, or a copy with aligned rows held by `storage`.
Matrix operand(const Exec& ex, const Tensor& m, DType dtype, Tensor& storage) {
    const Matrix plain{m.raw(), m.dtype(), m.stride(), false};
    if (m.dtype() == dtype) return plain;
    const int64_t rows = m.dim(0), columns = m.dim(1), stride = padded(columns);
    storage = Tensor::empty(ex, {rows, stride}, dtype);
    cuda::convert_rows(ex, rows, columns, plain, storage.raw(), dtype, stride);
    return {storage.raw(), dtype, stride, false};
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
    float* data = logits.view<float, 2>().data;
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t count = std::min(tile, t - at);
        linear(ex, hidden.rows(at, at + count), weight, {}, real.rows(0, count));
        rows<void>(ex, {v, stride, data, targets.data + at, nullptr, nll.data + at}, count);
    }
}

void linear_cross_entropy_backward(const Exec& ex, const LinearCrossEntropyBackward& call,
                                   int64_t tile_bytes) {
    const int64_t t = call.hidden.dim(0), e = call.hidden.dim(1), v = call.weight.dim(0);
    const int64_t stride = padded(v), tile = rows_of_tile(t, v, tile_bytes);
    const bool round = call.weight.dtype() == DType::bf16 || ex.matmul == MatmulPrecision::bf16;
    const DType dtype = round ? DType::bf16 : DType::f32;
    Tensor hidden_copy, weight_copy;
    const Matrix h = operand(ex, call.hidden, dtype, hidden_copy);
    const Matrix w = operand(ex, call.weight, dtype, weight_copy);
    const Scratch<float> logits(ex, static_cast<size_t>(tile * stride));
    const Matrix g{logits.data(), dtype, round ? 2 * stride : stride, false};
    for (int64_t at = 0; at < t; at += tile) {
        const int64_t count = std::min(tile, t - at);
        const Matrix x = rows_from(h, at);
        product(
            ex,
            {.m = count, .n = v, .k = e, .a = x, .b = transposed(w), .c = logits.data(), .c_stride = stride});
        const Params p{
            v, stride, logits.data(), call.targets.data + at, call.grad_nll.data + at, call.nll.data + at};
        round ? rows<bf16>(ex, p, count) : rows<float>(ex, p, count);
        if (call.grad_hidden) {
            const Tensor grad = call.grad_hidden.rows(at, at + count);
            product(ex, {.m = count,
                         .n = e,
                         .k = v,
                         .a = g,
                         .b = w,
                         .c = grad.raw(),
                         .c_dtype = grad.dtype(),
                         .c_stride = grad.stride(),
                         .beta = call.set_hidden ? 0.0f : 1.0f});
        }
        if (call.grad_weight)
            product(ex, {.m = v,
                         .n = e,
                         .k = count,
                         .a = transposed(g),
                         .b = x,
                         .c = call.grad_weight.data,
                         .c_stride = call.grad_weight.stride,
                         .beta = 1.0f});
    }
}

void mean_nll(const Exec& ex, View<const float, 1> nll, double counted, float* mean) {
    Mean<<<1, kThreadsLong, 0, stream_of(ex)>>>(nll.data, nll.shape[0], counted, mean);
    check_launch(kOp);
}

}  // namespace ssm::cuda
