// CUDA kernel of ssd_step: states are streamed through registers. L lanes take a row of n = W L numbers, 16
// bytes each (32 where n is 256 and the states are f32), and, one after another, U rows that lie next to each
// other; all loads are begun before the first is used. B and C are held meanwhile. A lane of each row's group
// writes y.
#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/core/cuda/words.cuh"
#include "ssm/ops/ssd/ssd_impl.h"

namespace ssm::cuda {
namespace {

constexpr int kMostThreads = 256;

template <class T, class S>
struct StepParams {
    SsdInputs<T> in;
    View<S, 4> state;
    View<T, 3> y;
};

template <class T>
__device__ inline float bias_of(const SsdInputs<T>& in, int64_t h) {
    return in.dt_bias.data != nullptr ? in.dt_bias.data[h * in.dt_bias.stride] : 0.0f;
}

template <class T>
__device__ inline float step_size(const SsdInputs<T>& in, int64_t s, int64_t h, float bias) {
    const float raw = to_float(in.dt.data[s * in.dt.stride + h]) + bias;
    if (!in.dt_softplus) return raw;
    return fminf(fmaxf(raw > 20.0f ? raw : log1pf(expf(raw)), in.dt_min), in.dt_max);
}

template <class T>
__device__ inline float skip_of(const SsdInputs<T>& in, int64_t h, int64_t row) {
    return in.D.data == nullptr ? 0.0f : in.D.data[h * in.D.stride + (in.D.shape[1] == 1 ? 0 : row)];
}

// States are read again a step later at the earliest: L2 may write them to memory and forget them first.
template <class S, int W>
__device__ inline void store_once(S* p, const Words<S, W>& v) {
#pragma unroll
    for (int i = 0; i < Words<S, W>::kCount; i += 4)
        __stcs(reinterpret_cast<uint4*>(p) + i / 4,
               make_uint4(v.at[i], v.at[i + 1], v.at[i + 2], v.at[i + 3]));
}

// A warp: U 32 / L rows of one head of one sequence.
template <class T, class S, int L, int U, int W>
__global__ void __launch_bounds__(kMostThreads) Step(const __grid_constant__ StepParams<T, S> a) {
    constexpr int kRows = U * kWarp / L, kLine = 128 / (W * static_cast<int>(sizeof(S)));
    const SsdInputs<T>& in = a.in;
    const int64_t heads = in.x.shape[1], p = in.x.shape[2], groups = in.B.shape[1], n = L * W;
    const int64_t blocks = (p + kRows - 1) / kRows;
    const int64_t unit = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    allow_next();
    if (unit >= in.x.shape[0] * heads * blocks) return wait_for_inputs();
    const int lane = threadIdx.x % L, group = threadIdx.x % kWarp / L;
    const int64_t s = unit / (heads * blocks), h = unit / blocks % heads,
                  row = unit % blocks * kRows + group * U;
    S* state = a.state.data + (in.slots.data != nullptr ? in.slots.data[s] : s) * a.state.stride +
               (h * p + row) * n + lane * W;
#pragma unroll
    for (int u = 0; u < U; ++u)
        if (lane % kLine == 0 && row + u < p) prefetch_l2(state + u * n);
    const int64_t mine = lane / (L / U), i = row + mine;
    const float A = in.A.data[h * in.A.stride], bias = bias_of(in, h),
                skip = i < p ? skip_of(in, h, i) : 0.0f;
    wait_for_inputs();

    Words<S, W> held[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
        if (row + u < p) held[u] = load_words<W>(state + u * n);
    const int64_t at = h / (heads / groups) * n + lane * W;
    const Words<T, W> B = load_words<W>(in.B.data + s * in.B.stride + at),
                      C = load_words<W>(in.C.data + s * in.C.stride + at);
    const T* x = in.x.data + s * in.x.stride + h * p + row;
    float inputs[U];
#pragma unroll
    for (int u = 0; u < U; ++u) inputs[u] = row + u < p ? to_float(x[u]) : 0.0f;
    const float own = i < p ? to_float(x[mine]) : 0.0f;
    const float dt = step_size(in, s, h, bias), decay = expf(dt * A);
    float sums[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (row + u >= p) break;
        float next[W];
#pragma unroll
        for (int k = 0; k < W; ++k) {
            next[k] = fmaf(decay, held[u][k], dt * inputs[u] * B[k]);
            sums[u] = fmaf(next[k], C[k], sums[u]);
        }
        store_once(state + u * n, to_words<S>(next));
    }
    const float sum = sum_values<U, L>(sums);
    if (lane % (L / U) != 0 || i >= p) return;
    a.y.data[s * a.y.stride + h * p + i] = from_float<T>(fmaf(skip, own, sum));
}

// Any n: eight lanes a row.
template <class T, class S>
__global__ void __launch_bounds__(kMostThreads) StepPlain(const __grid_constant__ StepParams<T, S> a) {
    constexpr int kLanes = 8, kRows = kMostThreads / kLanes;
    const SsdInputs<T>& in = a.in;
    const int64_t heads = in.x.shape[1], p = in.x.shape[2], groups = in.B.shape[1], n = in.B.shape[2];
    const int64_t s = blockIdx.x / heads, h = blockIdx.x % heads, group = h / (heads / groups);
    const int64_t i = blockIdx.y * kRows + threadIdx.x / kLanes;
    allow_next();
    wait_for_inputs();
    const float dt = step_size(in, s, h, bias_of(in, h)), decay = expf(dt * in.A.data[h * in.A.stride]);
    const bool inside = i < p;
    const float x = inside ? to_float(in.x.data[s * in.x.stride + h * p + i]) : 0.0f;
    const T* B = in.B.data + s * in.B.stride + group * n;
    const T* C = in.C.data + s * in.C.stride + group * n;
    S* state =
        a.state.data + (in.slots.data != nullptr ? in.slots.data[s] : s) * a.state.stride + (h * p + i) * n;
    float y = 0.0f;
    for (int64_t k = threadIdx.x % kLanes; inside && k < n; k += kLanes) {
        const float next = fmaf(decay, to_float(state[k]), dt * x * to_float(B[k]));
        state[k] = from_float<S>(next);
        y = fmaf(next, to_float(C[k]), y);
    }
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) y += __shfl_xor_sync(kAllLanes, y, offset);
    if (!inside || threadIdx.x % kLanes != 0) return;
    a.y.data[s * a.y.stride + h * p + i] = from_float<T>(fmaf(skip_of(in, h, i), x, y));
}

template <class T, class S, int L, int U, int W = 16 / sizeof(S)>
void launch(const Exec& ex, const StepParams<T, S>& a) {
    constexpr int kRows = U * kWarp / L;
    const int64_t units = a.in.x.shape[0] * a.in.x.shape[1] * ((a.in.x.shape[2] + kRows - 1) / kRows);
    // Few states: small blocks, so that they reach every multiprocessor.
    int64_t threads = kMostThreads;
    while (threads > kWarp && units * kWarp < 2 * threads * ex.cuda->multiprocessors()) threads /= 2;
    launch_overlapped(ex, "ssd_step", Step<T, S, L, U, W>,
                      {blocks_for(units * kWarp, threads), static_cast<unsigned>(threads)}, a);
}

}  // namespace

template <class T, class S>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<S, 4> state, View<T, 3> y) {
    constexpr int W = 16 / sizeof(S), kAligned = sizeof(T) * W < 16 ? W : 16 / sizeof(T);
    const StepParams<T, S> a{in, state, y};
    const int64_t n = in.B.shape[2];
    if (n == 256 && packable(state.data, state.stride, W) &&
        packable(in.B.data, in.B.stride, 16 / sizeof(T)) && packable(in.C.data, in.C.stride, 16 / sizeof(T)))
        return launch<T, S, 32, 4, 8>(ex, a);
    const bool packs = packable(state.data, state.stride, W) && packable(in.B.data, in.B.stride, kAligned) &&
                       packable(in.C.data, in.C.stride, kAligned);
    if (packs && n == 128) return launch<T, S, 128 / W, 4>(ex, a);
    if (packs && n == 64) return launch<T, S, 64 / W, 4>(ex, a);
    if (packs && n == 32) return launch<T, S, 32 / W, 4>(ex, a);
    if (packs && n == 16) return launch<T, S, 16 / W, 16 / W>(ex, a);
    const dim3 blocks(static_cast<unsigned>(in.x.shape[0] * in.x.shape[1]),
                      blocks_for(in.x.shape[2], kMostThreads / 8));
    launch_overlapped(ex, "ssd_step", StepPlain<T, S>, {blocks, kMostThreads}, a);
}

template void ssd_step(const Exec&, const SsdInputs<float>&, View<float, 4>, View<float, 3>);
template void ssd_step(const Exec&, const SsdInputs<bf16>&, View<float, 4>, View<bf16, 3>);
template void ssd_step(const Exec&, const SsdInputs<float>&, View<bf16, 4>, View<float, 3>);
template void ssd_step(const Exec&, const SsdInputs<bf16>&, View<bf16, 4>, View<bf16, 3>);

}  // namespace ssm::cuda
