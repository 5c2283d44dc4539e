// One kernel for a step's projection. A warp computes R neighbouring rows of W ("a task") with every row of
// x, its lanes read 16 bytes of a row each, U of them begun before the first is used; tasks are dealt out to
// all warps in turn. The first task's weights are under way before the kernel waits for its inputs. Then the
// block stages v = x w (with the gate) in shared memory, rounded to the weight's type, and sums v's squares;
// with one group the division by the norm comes after the product. Shared: [T i] of the weight's type.
#include <algorithm>

#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/ops/norm_linear/norm_linear_stage.cuh"

namespace ssm::cuda {
namespace {

using namespace norm_linear_kernels;

constexpr int kBlocks = 2 /* of a multiprocessor */, kMostRows = 8, kMostShared = 200 << 10;

// ---- The product ----

template <class W, int R, int N, int U>
struct Weights {
    Words<W, N> at[U][R];

    // U runs of 32 packs from column `base` of this lane.
    __device__ void fetch(const Params& p, int64_t task, int64_t base) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // What is too much is computed, not stored.
            const int64_t row = task * R + r < p.o ? task * R + r : p.o - 1;
            const W* from = static_cast<const W*>(p.weight) + row * p.weight_stride;
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int64_t j = base + u * kWarp * N;
                if (j < p.i) at[u][r] = load_words_once<N>(from + j);
            }
        }
    }

    // Sums of even and odd columns apart: chains of half the length.
    template <int T>
    __device__ void multiply(const Params& p, const W* v, int64_t base, float (&sums)[2][R * T]) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int64_t j = base + u * kWarp * N;
            if (j >= p.i) break;
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const Words<W, N> x = load_words<N>(v + t * p.i + j);
#pragma unroll
                for (int k = 0; k < N; ++k) {
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        float& sum = sums[R * T <= 8 ? k % 2 : 0][r * T + t];
                        sum = fmaf(at[u][r][k], x[k], sum);
                    }
                }
            }
        }
    }
};

// T: rows of x (p.t of them real). R: rows of W of a warp. N: elements of a load. P: of x's.
template <class X, class W, int T, int R, int N, int P>
__global__ void __launch_bounds__(kThreads, T <= 2 ? 3 : 2) Rows(const __grid_constant__ Params p) {
    constexpr int U = 8 / R, V = R * T, kEach = kWarp / V;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float squares[kWarps][T];
    W* v = reinterpret_cast<W*>(memory);
    allow_next();
    const int lane = threadIdx.x % kWarp, t = lane / kEach % T, r = lane / kEach / T;
    const bool holds = lane % kEach == 0;
    const int64_t turn = static_cast<int64_t>(gridDim.x) * kWarps;
    int64_t task = static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
    Weights<W, R, N, U> weights;
    Ahead ahead;
    if (task < p.tasks) {
        weights.fetch(p, task, lane * N);
        if (holds) fetch_constants(p, task * R + r, ahead);
    }
    Pack<float, P> norm_weight[1];
    fetch_norm_weights<P>(p, 0, norm_weight);
    wait_for_inputs();
    if (task < p.tasks && holds) fetch_variables(p, task * R + r, t, ahead);
    if (p.groups <= 1) {
        stage<X, W, false, T, P>(p, norm_weight, v, squares);
    } else {
        stage_groups<X, W, T>(p, v);
    }
    __syncthreads();
    const float divide = division<T>(p, squares, t);
    while (task < p.tasks) {
        float sums[2][V] = {};
        for (int64_t base = lane * N;;) {
            weights.template multiply<T>(p, v, base, sums);
            base += kWarp * N * U;
            if (base - lane * N >= p.i) break;
            weights.fetch(p, task, base);
        }
        const int64_t next = task + turn;
        if (next < p.tasks) weights.fetch(p, next, lane * N);
#pragma unroll
        for (int k = 0; k < V; ++k) sums[0][k] += sums[1][k];
        const float sum = sum_values<V>(sums[0]) * divide;
        if (holds) finish(p, task * R + r, t, sum, ahead);
        task = next;
        if (task >= p.tasks || !holds) continue;
        fetch_constants(p, task * R + r, ahead);
        fetch_variables(p, task * R + r, t, ahead);
    }
}

// ---- Launching ----

template <class X, class W, int T, int R, int N, int P>
void launch(const Exec& ex, Params p) {
    const size_t shared = static_cast<size_t>(T * p.i) * sizeof(W);
    const auto kernel = Rows<X, W, T, R, N, P>;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    check(allowed, kOp);
    p.tasks = (p.o + R - 1) / R;
    const int64_t blocks = std::min<int64_t>(p.tasks, kBlocks * ex.cuda->multiprocessors());
    launch_overlapped(ex, kOp, kernel, {static_cast<unsigned>(blocks), kThreads, shared}, p);
}

// As many rows a task as make eight loads of a lane, if all warps get a task then.
template <class X, class W, int T>
void choose_rows(const Exec& ex, const Params& p, bool packs) {
    constexpr int N = 16 / sizeof(W), P = 16 / sizeof(X);
    if (!packs) return launch<X, W, T, 1, 1, 1>(ex, p);
    const int64_t loads = (p.i + kWarp * N - 1) / (kWarp * N), each = p.o / ex.cuda->multiprocessors();
    if constexpr (T == 1) {
        if (loads <= 2 && each >= 2 * kWarps * kBlocks) return launch<X, W, T, 4, N, P>(ex, p);
    }
    if constexpr (T <= 4) {
        if (loads <= 4 && each >= kWarps * kBlocks) return launch<X, W, T, 2, N, P>(ex, p);
    }
    launch<X, W, T, 1, N, P>(ex, p);
}

template <class X, class W>
void choose(const Exec& ex, const Params& p, bool packs) {
    if (p.t <= 1) return choose_rows<X, W, 1>(ex, p, packs);
    if (p.t <= 2) return choose_rows<X, W, 2>(ex, p, packs);
    if constexpr (sizeof(W) == 4) {
        if (p.t > 4) return choose_rows<X, W, 8>(ex, p, packs);
    }
    choose_rows<X, W, 4>(ex, p, packs);
}

template <class T>
bool packs_of(const Tensor& m) {
    constexpr int64_t kPack = 16 / sizeof(T);
    return packable(reinterpret_cast<const T*>(m.raw()), m.stride(), kPack) && m.dim(1) % kPack == 0;
}

bool packs_of(const Tensor& m) {
    if (!m) return true;
    return m.dtype() == DType::bf16 ? packs_of<bf16>(m) : packs_of<float>(m);
}

ConvParams conv_params(const std::optional<ConvStep>& conv) {
    if (!conv) return {};
    const ConvStep& c = *conv;
    return {.first = c.first,
            .d = c.weight.shape[0],
            .k = static_cast<int>(c.weight.shape[1]),
            .weight = c.weight.data,
            .weight_stride = c.weight.stride,
            .bias = c.bias.data,
            .state = c.state.raw(),
            .state_stride = c.state.stride(),
            .slots = c.slots.data,
            .silu = c.activation == Activation::silu};
}

}  // namespace

bool norm_linear(const Exec& ex, const NormLinearInputs& in, const Tensor& y, const NormLinearEnd& end) {
    const Tensor& weight = in.weight.weight();
    const bool w16 = weight.dtype() == DType::bf16, x16 = in.x.dtype() == DType::bf16;
    const int64_t t = in.x.dim(0), i = in.x.dim(1);
    if (i == 0) return false;
    const RmsNormOptions norm = in.norm.value_or(RmsNormOptions{});
    const Params p{.i = i,
                   .o = weight.dim(0),
                   .t = static_cast<int>(t),
                   .x = in.x.raw(),
                   .z = in.z ? in.z.raw() : nullptr,
                   .x_stride = in.x.stride(),
                   .z_stride = in.z ? in.z.stride() : 0,
                   .norm_weight = in.norm ? in.norm_weight.data : nullptr,
                   .groups = in.norm ? norm.groups : 0,
                   .eps = norm.eps,
                   .unit_offset = norm.unit_offset,
                   .gate = norm.gate,
                   .weight = weight.raw(),
                   .weight_stride = weight.stride(),
                   .bias = in.bias.data,
                   .y = y.raw(),
                   .y_stride = y.stride(),
                   .y_is_bf16 = y.dtype() == DType::bf16,
                   .add = end.add,
                   .ask_first = end.ask_first,
                   .conv = conv_params(end.conv)};
    const bool packs = packs_of(in.x) && packs_of(in.z) && packs_of(weight) &&
                       reinterpret_cast<uintptr_t>(p.norm_weight) % 16 == 0;
    if (w16 && packs &&
        (small(ex, p, x16) || split(ex, p, x16) || (large_on_gpu(weight) && streamed(ex, p, x16))))
        return true;
    if (t > few_rows_on_gpu(weight) ||
        kMostRows * i * static_cast<int64_t>(size_of(weight.dtype())) > kMostShared)
        return false;
    if (x16 && w16) {
        choose<bf16, bf16>(ex, p, packs);
    } else if (w16) {
        choose<float, bf16>(ex, p, packs);
    } else {
        choose<float, float>(ex, p, packs);
    }
    return true;
}

}  // namespace ssm::cuda
