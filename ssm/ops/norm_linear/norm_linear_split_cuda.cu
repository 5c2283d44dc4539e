// A step's projection by a weight that fits in the registers of all multiprocessors: a block computes R
// neighbouring rows of W, its threads share out the columns. A thread has C packs of 16 bytes of each row
// under way before the kernel waits for its inputs, then reads the same columns of x, norms them (without the
// division, which follows the product) and multiplies. Sums over a warp's lanes, then, in order, over the
// warps.
#include <algorithm>

#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/ops/norm_linear/norm_linear_cuda.cuh"

namespace ssm::cuda::norm_linear_kernels {
namespace {

constexpr int kMostThreads = 256, kMostWarps = kMostThreads / kWarp;
constexpr int kMostPacks = 8 /* of W, of a thread */, kMostTokens = 4;
// Threads of all blocks, of a multiprocessor: measured (README.md).
constexpr int64_t threads_at_once(int64_t t) { return t == 1 ? 640 : 384; }

// N columns of v of one token; what it adds to the sum of squares.
template <class W, bool kPlain, int N, class X>
__device__ inline float make_v(const Params& p, int t, int64_t j, const Pack<float, N>& w, float (&v)[N]) {
    const Pack<X, N> x = load_pack<N>(static_cast<const X*>(p.x) + t * p.x_stride + j);
    if constexpr (kPlain) {
#pragma unroll
        for (int k = 0; k < N; ++k) v[k] = to_float(from_float<W>(to_float(x.at[k])));
        return 0.0f;
    }
    Pack<X, N> z{};
    if (p.gate != Gate::none) z = load_pack<N>(static_cast<const X*>(p.z) + t * p.z_stride + j);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float g = p.gate != Gate::none ? silu(to_float(z.at[k])) : 1.0f;
        float one = to_float(x.at[k]);
        if (p.gate == Gate::before) one *= g;
        squares = fmaf(one, one, squares);
        if (p.gate == Gate::after) one *= g;
        v[k] = to_float(from_float<W>(one * w.at[k]));
    }
    return squares;
}

// kPlain: neither norm nor gate. T: rows of x (p.t of them real). Thread v < R T finishes the sum of row v /
// T and token v % T.
template <class X, class W, bool kPlain, int T, int R, int C>
__global__ void __launch_bounds__(kMostThreads, T > 1        ? 2
                                                : R * C <= 2 ? 5
                                                : R * C <= 4 ? 4
                                                             : 3) Split(const __grid_constant__ Params p) {
    constexpr int N = 16 / sizeof(W), V = R * T, kEach = kWarp / V;
    static_assert(V <= kWarp);
    __shared__ float shared_sums[kMostWarps][V], shared_squares[kMostWarps][T];
    allow_next();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * R;
    Words<W, N> w[C][R];
    Pack<float, N> norm[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int64_t j = int64_t{c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)} * N;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // What is too much is computed, not stored.
            const int64_t row = first + r < p.o ? first + r : p.o - 1;
            if (j < p.i)
                w[c][r] = load_words_once<N>(static_cast<const W*>(p.weight) + row * p.weight_stride + j);
        }
        if constexpr (!kPlain) norm[c] = norm_weights<N>(p, j);
    }
    const int r = static_cast<int>(threadIdx.x) / T, t = threadIdx.x % T;
    const bool holds = threadIdx.x < V;
    Ahead ahead;
    if (holds) fetch_constants(p, first + r, ahead);
    wait_for_inputs();
    if (holds) fetch_variables(p, first + r, t, ahead);

    float sums[V] = {}, squares[T] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int64_t j = int64_t{c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)} * N;
        if (j >= p.i) break;
#pragma unroll
        for (int s = 0; s < T; ++s) {
            float v[N];
            if (s >= p.t) break;
            squares[s] += make_v<W, kPlain, N, X>(p, s, j, norm[c], v);
#pragma unroll
            for (int k = 0; k < N; ++k) {
#pragma unroll
                for (int q = 0; q < R; ++q) sums[q * T + s] = fmaf(w[c][q][k], v[k], sums[q * T + s]);
            }
        }
    }
    if (!kPlain && p.groups == 1) {
#pragma unroll
        for (int s = 0; s < T; ++s) squares[s] = warp_sum(squares[s]);
#pragma unroll
        for (int s = 0; s < T; ++s)
            if (lane == s) shared_squares[warp][s] = squares[s];
    }
    const float sum = sum_values<V>(sums);
    if (lane % kEach == 0) shared_sums[warp][lane / kEach] = sum;
    __syncthreads();
    if (!holds) return;
    float total = 0.0f, all = 0.0f;
    for (int k = 0; k < warps; ++k) total += shared_sums[k][threadIdx.x];
    if (!kPlain && p.groups == 1) {
        for (int k = 0; k < warps; ++k) all += shared_squares[k][t];
        total *= rsqrtf(all / static_cast<float>(p.i) + p.eps);
    }
    finish(p, first + r, t, total, ahead);
}

// ---- Launching ----

struct Shape {
    int64_t threads, packs;  // of a block; of a row, of a thread
};

// As few rows a block as leave room for the kernels before and after it.
template <class X, class W, bool kPlain, int T, int R, int C>
bool launch(const Exec& ex, const Params& p, const Shape& shape) {
    const int64_t blocks = (p.o + R - 1) / R;
    if (blocks * shape.threads > threads_at_once(p.t) * ex.cuda->multiprocessors()) {
        if constexpr (2 * R * C <= kMostPacks && 2 * R * T <= kWarp)
            return launch<X, W, kPlain, T, 2 * R, C>(ex, p, shape);
        return false;
    }
    launch_overlapped(ex, kOp, Split<X, W, kPlain, T, R, C>,
                      {static_cast<unsigned>(blocks), static_cast<unsigned>(shape.threads)}, p);
    return true;
}

template <class X, class W, bool kPlain, int T>
bool choose_columns(const Exec& ex, const Params& p) {
    constexpr int64_t N = 16 / sizeof(W);
    const int64_t packs = p.i / N,
                  threads = std::min<int64_t>((packs + kWarp - 1) / kWarp * kWarp, kMostThreads);
    const Shape shape{threads, (packs + threads - 1) / threads};
    if (shape.packs == 1) return launch<X, W, kPlain, T, 1, 1>(ex, p, shape);
    if (shape.packs == 2) return launch<X, W, kPlain, T, 1, 2>(ex, p, shape);
    return false;
}

template <class X, class W, bool kPlain>
bool choose_tokens(const Exec& ex, const Params& p) {
    if (p.t <= 1) return choose_columns<X, W, kPlain, 1>(ex, p);
    if (p.t <= 2) return choose_columns<X, W, kPlain, 2>(ex, p);
    return choose_columns<X, W, kPlain, 4>(ex, p);
}

}  // namespace

bool split(const Exec& ex, const Params& p, bool x_is_bf16) {
    if (p.t > kMostTokens || p.groups > 1) return false;
    if (!x_is_bf16) return choose_tokens<float, bf16, false>(ex, p);
    if (p.groups > 0 || p.gate != Gate::none) return choose_tokens<bf16, bf16, false>(ex, p);
    return choose_tokens<bf16, bf16, true>(ex, p);
}

}  // namespace ssm::cuda::norm_linear_kernels
