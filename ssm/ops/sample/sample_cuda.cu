// Greedy choice on a GPU: a block per row. A candidate is one 64-bit number, the logit's bits in rising order
// above the complement of its index, so that the largest number is the first of the largest logits.
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/sample/sample_impl.h"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 1024, kLoads = 7;
constexpr unsigned long long kNotANumber = ~0ull;

struct Params {
    View<const float, 2> logits;
    View<int32_t, 1> ids;
};

// The larger, or NaN if there is one.
__device__ inline float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// +0 and -0 are equal.
__device__ inline unsigned long long candidate(float x, int64_t index) {
    if (isnan(x)) return kNotANumber;
    const uint32_t bits = __float_as_uint(x + 0.0f);
    const uint32_t rising = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(rising) << 32 | ~static_cast<uint32_t>(index);
}

__device__ inline unsigned long long warp_largest(unsigned long long x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(kAllLanes, x, offset);
        x = x > other ? x : other;
    }
    return x;
}

template <int N>
__global__ void __launch_bounds__(kThreads) Argmax(const __grid_constant__ Params p) {
    __shared__ unsigned long long largest[kThreads / kWarp];
    const int64_t v = p.logits.shape[1];
    const float* row = p.logits.data + blockIdx.x * p.logits.stride;
    // Of this thread: the largest logit and the first pack that holds it.
    float most = -INFINITY;
    int64_t pack = threadIdx.x * N;
    for (int64_t base = threadIdx.x * N; base < v; base += kThreads * N * kLoads) {
        Pack<float, N> x[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u)
            if (base + u * kThreads * N < v) x[u] = load_pack<N>(row + base + u * kThreads * N);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
            if (base + u * kThreads * N >= v) break;
            float m = x[u].at[0];
#pragma unroll
            for (int k = 1; k < N; ++k) m = larger(m, x[u].at[k]);
            if (m > most) pack = base + u * kThreads * N;
            most = larger(most, m);
        }
    }
    unsigned long long best = isnan(most) ? kNotANumber : 0;
    for (int k = 0; k < N && pack < v; ++k) {
        const unsigned long long one = candidate(row[pack + k], pack + k);
        best = best > one ? best : one;
    }
    best = warp_largest(best);
    if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = best;
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    best = warp_largest(largest[threadIdx.x]);
    if (threadIdx.x == 0)
        p.ids.data[blockIdx.x * p.ids.stride] =
            best == kNotANumber ? -1 : static_cast<int32_t>(~static_cast<uint32_t>(best));
}

}  // namespace

void argmax(const Exec& ex, View<const float, 2> logits, View<int32_t, 1> ids) {
    constexpr int64_t kPack = 4;
    const auto blocks = static_cast<unsigned>(logits.shape[0]);
    if (logits.shape[1] % kPack == 0 && packable(logits.data, logits.stride, kPack)) {
        Argmax<kPack><<<blocks, kThreads, 0, stream_of(ex)>>>({logits, ids});
    } else {
        Argmax<1><<<blocks, kThreads, 0, stream_of(ex)>>>({logits, ids});
    }
    check_launch("argmax");
}

}  // namespace ssm::cuda
