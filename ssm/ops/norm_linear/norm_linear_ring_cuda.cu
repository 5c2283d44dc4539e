// A step's projection by a large weight. W comes through shared memory: each warp has a ring of slots there,
// for a piece of R rows of W each, which the copy engine fills in the order in which the warp reads them; a
// slot is asked for again as soon as it has been read. So a multiprocessor always has about the whole ring
// under way, and the rings are filled before the kernel waits for its inputs, while the kernels before it
// end. A warp computes R neighbouring rows ("a task") with every row of x; tasks are dealt out to all warps
// in turn. Shared: v [T i] of the weight's type, then [warps slots R kPiece] bytes.
#include <algorithm>

#include "ssm/core/cuda/bulk.cuh"
#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/ops/norm_linear/norm_linear_stage.cuh"

namespace ssm::cuda::norm_linear_kernels {
namespace {

constexpr int kPiece = 2048 /* bytes of a row of W */, kPacks = kPiece / 16 / kWarp /* of a lane */;
constexpr int kMostSlots = 16, kMostBytes = 200 << 10;

// The ring of a warp. Its first lane asks; the pieces of a task follow each other.
template <class W, int R>
struct Ring {
    static constexpr int kColumns = kPiece / static_cast<int>(sizeof(W));
    unsigned char* slots;
    uint64_t* full;  // of each slot: its piece is there
    uint64_t policy;
    int64_t task, turn;  // to be asked for next
    int64_t column = 0;
    int slot = 0;  // to be read next
    uint32_t parity = 0;

    __device__ void ask(const Params& p, int to) {
        if (task >= p.tasks) return;
        const int64_t columns = min(p.i - column, int64_t{kColumns});
        const auto bytes = static_cast<uint32_t>(columns * static_cast<int64_t>(sizeof(W)));
        expect_bytes(full + to, R * bytes);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // What is too much is computed, not stored.
            const int64_t row = task * R + r < p.o ? task * R + r : p.o - 1;
            const W* from = static_cast<const W*>(p.weight) + row * p.weight_stride + column;
            if (p.evict) {
                copy_bulk(slots + (to * R + r) * kPiece, from, bytes, full + to, policy);
            } else {
                copy_bulk(slots + (to * R + r) * kPiece, from, bytes, full + to);
            }
        }
        column += kColumns;
        if (column >= p.i) column = 0, task += turn;
    }

    // The piece of columns from `base` on, when it is there, times v; its slot is asked for again.
    template <int T>
    __device__ void multiply(const Params& p, const W* v, int64_t base, float (&sums)[2][R * T]) {
        constexpr int N = 16 / sizeof(W);
        const int lane = threadIdx.x % kWarp;
        wait_barrier(full + slot, parity);
        const W* piece = reinterpret_cast<const W*>(slots + slot * R * kPiece);
#pragma unroll
        for (int u = 0; u < kPacks; ++u) {
            const int at = (u * kWarp + lane) * N;
            if (base + at >= p.i) break;
            Words<W, N> w[R];
#pragma unroll
            for (int r = 0; r < R; ++r) w[r] = load_words<N>(piece + r * kColumns + at);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const Words<W, N> x = load_words<N>(v + t * p.i + base + at);
#pragma unroll
                for (int k = 0; k < N; ++k) {
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        float& sum = sums[k % 2][r * T + t];
                        sum = fmaf(w[r][k], x[k], sum);
                    }
                }
            }
        }
        __syncwarp();
        if (lane == 0) ask(p, slot);
        if (++slot == p.slots) slot = 0, parity ^= 1u;
    }
};

// kPlain: neither norm nor gate. T: rows of x (p.t of them real). R: rows of W of a warp.
template <class X, class W, bool kPlain, int T, int R>
__global__ void __launch_bounds__(kThreads, T == 1 && (kPlain || sizeof(X) == 4) ? 4 : 3)
    Streamed(const __grid_constant__ Params p) {
    constexpr int V = R * T, kEach = kWarp / V, P = 16 / sizeof(X);
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ uint64_t full[kWarps][kMostSlots];
    __shared__ float squares[kWarps][T];
    W* v = reinterpret_cast<W*>(memory);
    allow_next();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane / kEach % T,
              r = lane / kEach / T;
    const bool holds = lane % kEach == 0;
    const int64_t turn = static_cast<int64_t>(gridDim.x) * kWarps;
    int64_t task = static_cast<int64_t>(warp) * gridDim.x + blockIdx.x;
    Ring<W, R> ring{.slots = memory + p.v_bytes + int64_t{warp} * p.slots * R * kPiece,
                    .full = full[warp],
                    .policy = read_once_policy(),
                    .task = task,
                    .turn = turn};
    if (lane == 0) {
        for (int s = 0; s < p.slots; ++s) init_barrier(full[warp] + s, 1);
        publish_barriers();
        for (int s = 0; s < p.slots; ++s) ring.ask(p, s);
    }
    __syncwarp();
    Ahead ahead;
    if (task < p.tasks && holds) fetch_constants(p, task * R + r, ahead);
    Pack<float, P> norm_weight[2];
    if constexpr (!kPlain) fetch_norm_weights<P>(p, 0, norm_weight);
    wait_for_inputs();
    if (task < p.tasks && holds) fetch_variables(p, task * R + r, t, ahead);
    stage<X, W, kPlain, T, P>(p, norm_weight, v, squares);
    __syncthreads();
    const float divide = kPlain ? 1.0f : division<T>(p, squares, t);
    while (task < p.tasks) {
        float sums[2][V] = {};
        for (int64_t base = 0; base < p.i; base += ring.kColumns) ring.template multiply<T>(p, v, base, sums);
#pragma unroll
        for (int k = 0; k < V; ++k) sums[0][k] += sums[1][k];
        const float sum = sum_values<V>(sums[0]) * divide;
        if (holds) finish(p, task * R + r, t, sum, ahead);
        task += turn;
        if (task >= p.tasks || !holds) continue;
        fetch_constants(p, task * R + r, ahead);
        fetch_variables(p, task * R + r, t, ahead);
    }
}

// ---- Launching ----

template <class X, class W, bool kPlain, int T, int R>
bool launch(const Exec& ex, Params p) {
    const auto kernel = Streamed<X, W, kPlain, T, R>;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
    check(allowed, kOp);
    p.tasks = (p.o + R - 1) / R;
    p.v_bytes = (T * p.i * static_cast<int64_t>(sizeof(W)) + 127) / 128 * 128;
    p.slots = static_cast<int>(std::min<int64_t>(knob("SSM_RING_KB", 12) * 1024 / (R * kPiece), kMostSlots));
    p.evict = knob("SSM_RING_EVICT", 0) != 0;
    const int64_t shared = p.v_bytes + int64_t{kWarps} * p.slots * R * kPiece;
    if (shared > kMostBytes || p.slots < 1) return false;
    const int64_t blocks =
        std::min<int64_t>(p.tasks, knob("SSM_RING_BLOCKS", 1) * ex.cuda->multiprocessors());
    launch_overlapped(ex, kOp, kernel, {static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared)},
                      p);
    return true;
}

template <class X, class W, bool kPlain, int R>
bool choose_tokens(const Exec& ex, const Params& p) {
    if (p.t <= 1) return launch<X, W, kPlain, 1, R>(ex, p);
    if (p.t <= 2) return launch<X, W, kPlain, 2, R>(ex, p);
    return launch<X, W, kPlain, 4, R>(ex, p);
}

template <class X, class W, bool kPlain>
bool choose(const Exec& ex, const Params& p) {
    return knob("SSM_RING_ROWS", 2) == 2 ? choose_tokens<X, W, kPlain, 2>(ex, p)
                                         : choose_tokens<X, W, kPlain, 1>(ex, p);
}

}  // namespace

bool streamed(const Exec& ex, const Params& p, bool x_is_bf16) {
    if (p.t > knob("SSM_RING_T", 4) || p.groups > 1 || p.o > knob("SSM_RING_MOST", 1 << 30) ||
        p.o * p.i < knob("SSM_RING_LEAST", 4 << 20))
        return false;
    if (!x_is_bf16) return choose<float, bf16, false>(ex, p);
    if (p.groups > 0 || p.gate != Gate::none) return choose<bf16, bf16, false>(ex, p);
    return choose<bf16, bf16, true>(ex, p);
}

}  // namespace ssm::cuda::norm_linear_kernels
