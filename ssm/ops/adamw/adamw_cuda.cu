// CUDA kernels of adamw: one pass over memory by packs of 16 bytes; the sum of squares in f64 over a fixed
// split into blocks, added in their order.
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/adamw/adamw_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "adamw";
constexpr int kThreads = 256;

struct StepParams {
    int64_t count, packs;  // `packs` of four, the rest one by one
    float* param;
    const float* grad;
    float *m, *v;
    AdamWConstants c;
};

template <int N>
__device__ inline void update(const StepParams& p, int64_t i) {
    const AdamWConstants& c = p.c;
    const Pack<float, N> grad = load_pack<N>(p.grad + i);
    Pack<float, N> m = load_pack<N>(p.m + i), v = load_pack<N>(p.v + i), param = load_pack<N>(p.param + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float g = grad.at[k];
        m.at[k] = fmaf(c.beta1, m.at[k], c.g1 * g);
        v.at[k] = fmaf(c.beta2, v.at[k], c.g2 * g * g);
        const float step = c.rate * m.at[k] / fmaf(sqrtf(v.at[k]), c.inv_bias2, c.eps);
        param.at[k] = fmaf(c.decay, param.at[k], -step);
    }
    store_pack(p.m + i, m);
    store_pack(p.v + i, v);
    store_pack(p.param + i, param);
}

__global__ void __launch_bounds__(kThreads) Step(const __grid_constant__ StepParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < p.packs) {
        update<4>(p, i * 4);
    } else if (i + 3 * p.packs < p.count) {
        update<1>(p, i + 3 * p.packs);
    }
}

// Sums of kPart elements each; then of `count` sums by one block.
constexpr int64_t kPart = 32768;

__device__ inline double block_sum_f64(double x) {
    __shared__ double sums[kThreads];
    sums[threadIdx.x] = x;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];  // in thread 0
}

template <int N>
__global__ void __launch_bounds__(kThreads) SquaredParts(const float* x, int64_t count, double* parts) {
    const int64_t first = blockIdx.x * kPart, last = first + kPart < count ? first + kPart : count;
    double sum = 0;
    int64_t i = first + threadIdx.x * N;
#pragma unroll 4
    for (; i + N <= last; i += kThreads * N) {
        const Pack<float, N> v = load_pack<N>(x + i);
#pragma unroll
        for (int k = 0; k < N; ++k) sum = fma(double{v.at[k]}, double{v.at[k]}, sum);
    }
    for (; i < last; ++i) sum = fma(double{x[i]}, double{x[i]}, sum);  // the last of a pack
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) Total(const double* parts, int64_t count, double* total) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) *total = sum;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void adamw_step(const Exec& ex, int64_t count, float* param, const float* grad, float* m, float* v,
                const AdamWConstants& c) {
    if (count == 0) return;
    const int64_t packs = aligned(param) && aligned(grad) && aligned(m) && aligned(v) ? count / 4 : 0;
    const unsigned blocks = blocks_for(count - 3 * packs, kThreads);
    Step<<<blocks, kThreads, 0, stream_of(ex)>>>({count, packs, param, grad, m, v, c});
    check_launch(kOp);
}

double squared_norm(const Exec& ex, int64_t count, const float* x) {
    if (count == 0) return 0;
    const int64_t blocks = (count + kPart - 1) / kPart;
    const Scratch<double> parts(ex, static_cast<size_t>(blocks + 1));
    if (aligned(x)) {
        SquaredParts<4>
            <<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(ex)>>>(x, count, parts.data());
    } else {
        SquaredParts<1>
            <<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(ex)>>>(x, count, parts.data());
    }
    check_launch(kOp);
    Total<<<1, kThreads, 0, stream_of(ex)>>>(parts.data(), blocks, parts.data() + blocks);
    check_launch(kOp);
    double total = 0;
    ex.allocator->copy_out(&total, parts.data() + blocks, sizeof(total));
    return total;
}

}  // namespace ssm::cuda
