// A step's projection by a large weight. W comes through shared memory: each warp has a ring of slots there,
// for a piece of R rows of W each, which the copy engine fills in the order in which the warp reads them; a
// slot is asked for again as soon as it has been read. So a multiprocessor always has about the whole ring
// under way, and the rings are filled before the kernel waits for its inputs, while the kernels before it
// end. A warp computes R neighbouring rows ("a task") with every row of x; tasks are dealt out to all warps
// in turn. Shared: v [T i] of the weight's type, then [warps] rings.
#include <algorithm>

#include "ssm/core/cuda/bulk.cuh"
#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/ops/norm_linear/norm_linear_stage.cuh"

namespace ssm::cuda::norm_linear_kernels {
namespace {

constexpr int kMostTokens = 2, kMostWarps = 10, kMostThreads = kMostWarps * kWarp;
constexpr int kPiece = 1024 /* bytes of a row of W */, kPacks = kPiece / 16 / kWarp /* of a lane */;
constexpr int kRing = 8 << 10 /* bytes of a warp */, kMostBytes = 112 << 10;
constexpr int kBlocks = 2;  // of a multiprocessor

// The ring of a warp. Its first lane asks; the pieces of a task follow each other.
template <class W, int R>
struct Ring {
    static constexpr int kSlots = kRing / (R * kPiece), kColumns = kPiece / static_cast<int>(sizeof(W));
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
            copy_bulk(slots + (to * R + r) * kPiece, from, bytes, full + to, policy);
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
        if (++slot == kSlots) slot = 0, parity ^= 1u;
    }
};

template <class X, bool kPlain>
constexpr bool kLean = kPlain || sizeof(X) == 4;  // no gate

// Registers: 64 where there is no gate, so that the blocks of the kernels before and after find room too;
// with one 80. kPlain: neither norm nor gate. T: rows of x (p.t of them real). R: rows of W of a task. The
// first kWarps warps stage v. A lane finishes one sum: of row lane % V / T and token lane % T of a warp's
// task number lane / V, so that what its end needs is fetched once, for many tasks.
template <class X, class W, bool kPlain, int T, int R>
__global__ void __launch_bounds__(T == 1 && !kLean<X, kPlain> ? 384 : kMostThreads,
                                  T == 1 && kLean<X, kPlain> ? 3 : 2)
    Streamed(const __grid_constant__ Params p) {
    constexpr int V = R * T, kEach = kWarp / V, P = 16 / sizeof(X);
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ uint64_t full[kMostWarps][Ring<W, R>::kSlots];
    __shared__ float squares[kWarps][T];
    W* v = reinterpret_cast<W*>(memory);
    if (!p.ask_first) allow_next();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % T;
    const int64_t turn = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
    int64_t task = static_cast<int64_t>(warp) * gridDim.x + blockIdx.x;
    Ring<W, R> ring{.slots = memory + p.v_bytes + int64_t{warp} * kRing,
                    .full = full[warp],
                    .policy = read_once_policy(),
                    .task = task,
                    .turn = turn};
    if (lane == 0) {
        for (int s = 0; s < ring.kSlots; ++s) init_barrier(full[warp] + s, 1);
        for (int s = 0; s < ring.kSlots; ++s) ring.ask(p, s);
    }
    __syncwarp();
    int64_t row = (task + lane / V * turn) * R + lane % V / T;
    Ahead ahead;
    fetch_constants(p, row, ahead);
    Pack<float, P> norm_weight[2];
    if constexpr (!kPlain) fetch_norm_weights<P>(p, 0, norm_weight);
    if (p.ask_first) allow_next();
    wait_for_inputs();
    fetch_variables(p, row, t, ahead);
    if (warp < kWarps) stage<X, W, kPlain, T, P>(p, norm_weight, v, squares);
    __syncthreads();
    const float divide = kPlain ? 1.0f : division<T>(p, squares, t);
    while (task < p.tasks) {
        float mine = 0.0f;
        for (int n = 0; n < kEach && task < p.tasks; ++n, task += turn) {
            float sums[2][V] = {};
            for (int64_t base = 0; base < p.i; base += ring.kColumns)
                ring.template multiply<T>(p, v, base, sums);
#pragma unroll
            for (int k = 0; k < V; ++k) sums[0][k] += sums[1][k];
            const float sum = __shfl_sync(kAllLanes, sum_values<V>(sums[0]), lane % V * kEach);
            if (lane / V == n) mine = sum;
        }
        finish(p, row, t, mine * divide, ahead);
        if (task >= p.tasks) break;
        row += kEach * turn * R;
        fetch_constants(p, row, ahead);
        fetch_variables(p, row, t, ahead);
    }
}

// ---- Launching ----

// As many warps a block as share out the tasks most evenly.
int64_t warps_for(int64_t tasks, int64_t blocks) {
    int64_t best = kWarps, idle = blocks * kMostWarps;
    for (int64_t w = kWarps; w <= kMostWarps; ++w) {
        const int64_t all = blocks * w, left = (tasks + all - 1) / all * all - tasks;
        if (left < idle) best = w, idle = left;
    }
    return best;
}

template <class X, class W, bool kPlain, int T, int R>
bool launch(const Exec& ex, Params p) {
    const auto kernel = Streamed<X, W, kPlain, T, R>;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
    check(allowed, kOp);
    p.tasks = (p.o + R - 1) / R;
    p.v_bytes = (T * p.i * static_cast<int64_t>(sizeof(W)) + 127) / 128 * 128;
    const int64_t blocks = std::min<int64_t>(p.tasks, kBlocks * ex.cuda->multiprocessors()),
                  warps = warps_for(p.tasks, blocks), shared = p.v_bytes + warps * kRing;
    if (shared > kMostBytes) return false;
    launch_overlapped(
        ex, kOp, kernel,
        {static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp), static_cast<size_t>(shared)},
        p);
    return true;
}

template <class X, class W, bool kPlain>
bool choose(const Exec& ex, const Params& p) {
    if (p.t > 1) return launch<X, W, kPlain, 2, 2>(ex, p);
    // One row where that still is at most one task a warp (out_proj): more warps share the reading. Where v
    // is yet to be made, two rows hide it better.
    if constexpr (kPlain) {
        if (p.o <= kBlocks * kMostWarps * ex.cuda->multiprocessors())
            return launch<X, W, kPlain, 1, 1>(ex, p);
    }
    return launch<X, W, kPlain, 1, 2>(ex, p);
}

}  // namespace

bool streamed(const Exec& ex, const Params& p, bool x_is_bf16) {
    if (p.t > kMostTokens || p.groups > 1) return false;
    if (!x_is_bf16) return choose<float, bf16, false>(ex, p);
    if (p.groups > 0 || p.gate != Gate::none) return choose<bf16, bf16, false>(ex, p);
    return choose<bf16, bf16, true>(ex, p);
}

}  // namespace ssm::cuda::norm_linear_kernels
