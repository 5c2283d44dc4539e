// out(c) += the sum of column c of a dense [rows width] matrix: what blocks of a backward pass leave as
// partial sums of a parameter's gradient. Rows are added in a fixed order, without atomics: the same bytes
// from run to run. Included by .cu files only.
#pragma once

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"

namespace ssm::cuda {

constexpr int kSumLanes = 32;  // rows that are added at the same time

// `out(c)` is a pointer to where column c goes, or null.
template <class Out>
__global__ void __launch_bounds__(kSumLanes* kWarp)
    AddColumnSums(const float* partial, int64_t rows, int64_t width, Out out) {
    __shared__ float sums[kSumLanes][kWarp + 1];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
    float sum = 0;
    if (column < width) {
#pragma unroll 4
        for (int64_t r = threadIdx.y; r < rows; r += kSumLanes) sum += partial[r * width + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // Transposed: warp y sums column y of the block.
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.y;
    if (threadIdx.x != 0 || mine >= width) return;
    if (float* to = out(mine)) *to += sum;
}

template <class Out>
void add_column_sums(const Exec& ex, const float* partial, int64_t rows, int64_t width, Out out,
                     std::string_view op) {
    AddColumnSums<<<blocks_for(width, kWarp), dim3(kWarp, kSumLanes), 0, stream_of(ex)>>>(partial, rows,
                                                                                          width, out);
    check_launch(op);
}

}  // namespace ssm::cuda
