// CUDA kernels of adamw: a block takes a piece of a parameter, whatever parameter it is of, so that one
// launch is a step; the sum of squares in f64 over the same pieces, added in their order.
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/adamw/adamw_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "adamw";
constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int kPacks = static_cast<int>(kAdamWPiece) / (kThreads * kPack);  // of a thread

__device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct StepParams {
    const AdamWPiece* pieces;
    const float *rates, *norm;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, clip;
};

__device__ inline AdamWConstants constants_of(const StepParams& p, float norm, float weight_decay) {
    const float lr = p.rates[0];
    const float scale = p.clip > 0.0f ? fminf(1.0f, p.clip / norm) : 1.0f;
    return {.beta1 = p.beta1,
            .g1 = p.one_minus_beta1 * scale,
            .beta2 = p.beta2,
            .g2 = p.one_minus_beta2 * scale * scale,
            .decay = fmaf(-lr, weight_decay, 1.0f),
            .rate = lr / p.rates[1],
            .inv_bias2 = 1.0f / sqrtf(p.rates[2]),
            .eps = p.eps};
}

template <int N>
struct Elements {
    Pack<float, N> grad, m, v, param;

    __device__ void load(const AdamWPiece& p, int i) {
        grad = load_pack<N>(p.grad + i);
        m = load_pack<N>(p.m + i);
        v = load_pack<N>(p.v + i);
        param = load_pack<N>(p.param + i);
    }
    __device__ void step(const AdamWConstants& c) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float g = grad.at[k];
            m.at[k] = fmaf(c.beta1, m.at[k], c.g1 * g);
            v.at[k] = fmaf(c.beta2, v.at[k], c.g2 * g * g);
            const float by = c.rate * m.at[k] / fmaf(sqrtf(v.at[k]), c.inv_bias2, c.eps);
            param.at[k] = fmaf(c.decay, param.at[k], -by);
        }
    }
    __device__ void store(const AdamWPiece& p, int i) const {
        store_pack(p.m + i, m);
        store_pack(p.v + i, v);
        store_pack(p.param + i, param);
        if (!p.keep_grad) store_pack(p.grad + i, Pack<float, N>{});
        if (p.rounded == nullptr) return;
        Pack<bf16, N> rounded;
#pragma unroll
        for (int k = 0; k < N; ++k) rounded.at[k] = from_float<bf16>(param.at[k]);
        store_pack(p.rounded + i, rounded);
    }
};

// Two packs in flight.
__device__ inline void step_packs(const AdamWPiece& p, const AdamWConstants& c) {
    constexpr int kTogether = 2;
#pragma unroll 1
    for (int first = threadIdx.x * kPack; first < p.count; first += kTogether * kThreads * kPack) {
        Elements<kPack> x[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const int i = first + u * kThreads * kPack;
            if (i + kPack <= p.count) x[u].load(p, i);
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const int i = first + u * kThreads * kPack;
            if (i + kPack > p.count) continue;
            x[u].step(c);
            x[u].store(p, i);
        }
    }
}

__device__ inline void step_ones(const AdamWPiece& p, const AdamWConstants& c, int begin) {
    for (int i = begin + static_cast<int>(threadIdx.x); i < p.count; i += kThreads) {
        Elements<1> x;
        x.load(p, i);
        x.step(c);
        x.store(p, i);
    }
}

__global__ void __launch_bounds__(kThreads) Step(const __grid_constant__ StepParams params) {
    const AdamWPiece p = params.pieces[blockIdx.x];
    const float norm = params.norm[0];
    if (!(fabsf(norm) < INFINITY)) {
        for (int i = threadIdx.x; !p.keep_grad && i < p.count; i += kThreads) p.grad[i] = 0.0f;
        return;
    }
    const AdamWConstants c = constants_of(params, norm, p.weight_decay);
    const bool packs = aligned(p.param) && aligned(p.grad) && aligned(p.m) && aligned(p.v) &&
                       reinterpret_cast<uintptr_t>(p.rounded) % 8 == 0;
    if (packs) step_packs(p, c);
    step_ones(p, c, packs ? p.count / kPack * kPack : 0);
}

// Sum over the block, in thread 0, in a fixed order.
template <int Threads>
__device__ inline double block_sum_f64(double x) {
    __shared__ double sums[Threads / kWarp];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    for (int i = 1; threadIdx.x == 0 && i < Threads / kWarp; ++i) x += sums[i];
    return x;
}

__global__ void __launch_bounds__(kThreads) SquaredPieces(const AdamWPiece* pieces, double* sums) {
    const float* x = pieces[blockIdx.x].grad;
    const int count = pieces[blockIdx.x].count;
    const int packed = aligned(x) ? count / kPack * kPack : 0;
    Pack<float, kPack> v[kPacks] = {};
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
        const int i = (u * kThreads + static_cast<int>(threadIdx.x)) * kPack;
        if (i < packed) v[u] = load_pack<kPack>(x + i);
    }
    double sum = 0;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum = fma(double{v[u].at[k]}, double{v[u].at[k]}, sum);
    }
    for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kThreads)
        sum = fma(double{x[i]}, double{x[i]}, sum);
    sum = block_sum_f64<kThreads>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

constexpr int kNormThreads = 1024;
__global__ void __launch_bounds__(kNormThreads) Norm(const double* sums, int64_t count, float* norm) {
    double sum = 0;
#pragma unroll 16
    for (int64_t i = threadIdx.x; i < count; i += kNormThreads) sum += sums[i];
    sum = block_sum_f64<kNormThreads>(sum);
    if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

}  // namespace

void adamw_step(const Exec& ex, const AdamWPiece* pieces, int64_t count, const AdamWOptions& options,
                const float* rates, const float* norm) {
    if (count == 0) return;
    const auto one_minus = [](float beta) { return static_cast<float>(1.0 - static_cast<double>(beta)); };
    Step<<<static_cast<unsigned>(count), kThreads, 0, stream_of(ex)>>>(
        {pieces, rates, norm, options.beta1, one_minus(options.beta1), options.beta2,
         one_minus(options.beta2), options.eps, options.clip});
    check_launch(kOp);
}

void gradient_norm(const Exec& ex, const AdamWPiece* pieces, int64_t count, float* norm) {
    const Scratch<double> sums(ex, static_cast<size_t>(count));
    if (count > 0) {
        SquaredPieces<<<static_cast<unsigned>(count), kThreads, 0, stream_of(ex)>>>(pieces, sums.data());
        check_launch(kOp);
    }
    Norm<<<1, kNormThreads, 0, stream_of(ex)>>>(sums.data(), count, norm);
    check_launch(kOp);
}

}  // namespace ssm::cuda
