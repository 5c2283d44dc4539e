// The loss of a linear head on a GPU: a tile of logits by cuBLASLt in f32, a pass over its rows that leaves
// the gradient in its place (in f32, or in bf16, what the next products read, over the first half of a row),
// and the two gradients' products.
#include <algorithm>
#include <optional>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
#include "ssm/ops/cross_entropy/cross_entropy_rows.cuh"
#include "ssm/ops/linear/linear_impl.h"

namespace ssm::cuda {
namespace {

using linear_detail::Matrix;

constexpr std::string_view kOp = "linear_cross_entropy";

template <class G>
void rows(const Exec& ex, const Params& p) {
    const auto blocks = static_cast<unsigned>(p.rows);
    if (p.v <= kShortRow) {
        Rows<G, kThreadsShort><<<blocks, kThreadsShort, 0, stream_of(ex)>>>(p);
    } else if (p.v <= kRingRow) {
        constexpr int kBytes = static_cast<int>(sizeof(Ring));
        check(cudaFuncSetAttribute(RingRows<G>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), kOp);
        const auto most = static_cast<unsigned>(ex.cuda->multiprocessors());
        RingRows<G><<<std::min(blocks, most), kRingThreads, kBytes, stream_of(ex)>>>(p);
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
        rows<void>(ex, {count, v, stride, data, targets.data + at, nullptr, nll.data + at});
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
        const Params p{count,
                       v,
                       stride,
                       logits.data(),
                       call.targets.data + at,
                       call.grad_nll.data + at,
                       call.nll.data + at};
        round ? rows<bf16>(ex, p) : rows<float>(ex, p);
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
                         .beta = call.set.hidden ? 0.0f : 1.0f});
        }
        if (call.grad_weight)
            product(ex, {.m = v,
                         .n = e,
                         .k = count,
                         .a = transposed(g),
                         .b = x,
                         .c = call.grad_weight.data,
                         .c_stride = call.grad_weight.stride,
                         .beta = call.set.weight && at == 0 ? 0.0f : 1.0f});
    }
}

void mean_nll(const Exec& ex, View<const float, 1> nll, double counted, float* mean) {
    Mean<<<1, kThreadsLong, 0, stream_of(ex)>>>(nll.data, nll.shape[0], counted, mean);
    check_launch(kOp);
}

}  // namespace ssm::cuda
