// A step's projection by the tensor cores (m16n8k16): 16 rows of W, up to 8 rows of x a product. The columns
// are shared out to the warps of a block and, where W has few rows, of a cluster of blocks, so that a warp
// needs a part of every row of x once: it makes v = x w of that part itself, for all its tiles, without a
// barrier before its first product. The warps' sums are added in a fixed order. Before its inputs are there,
// a block has its first weights in registers and more of them on their way to L2.
//
// Lane 4 g + q holds 8 neighbouring columns, those of quarter q of a run of 32, of rows g and g + 8 of W and
// of row g of x. Which columns of the product they are does not matter as long as W and x agree: every load
// is one of 16 bytes.
#include <algorithm>

#include "ssm/core/cuda/cluster.cuh"
#include "ssm/core/cuda/products.cuh"
#include "ssm/ops/norm_linear/norm_linear_cuda.cuh"

namespace ssm::cuda::norm_linear_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kBlocks = 2 /* of a multiprocessor */;
constexpr int kTileRows = 16, kTileTokens = 8, kRun = 32, kQuarter = 8, kMostCluster = 8;
constexpr int kFewestTokens = 5, kMostTokens = 32;  // measured (README.md): fewer are faster by FMAs
constexpr int kU = 4;                               // runs of W in registers
constexpr int kMostRuns = 8;                        // of x of a warp
constexpr int kTokenStride = kTileRows + 4;         // of sums: without bank conflicts
constexpr int kMostShared = 100 << 10;
constexpr int64_t kMostSide = 1 << 24;  // of W
constexpr int64_t kAhead = 64 << 10;    // bytes of W that a block asks to be brought to L2
// More rows of x than kMostTokens are taken in groups by different blocks, each of which reads W: up to so
// many rows, and weights so small (x_proj's), that it is faster than cuBLASLt.
constexpr int64_t kMostGrouped = 512, kMostGroupedSize = 160 * 4096;

struct alignas(16) Bits {
    uint32_t at[4];  // 8 of bf16
};

// The columns of a warp: `count` runs from run `begin` on; no warp has more than `most`.
struct Columns {
    int begin, count, most;
};

__device__ inline int runs_of(const Params& p) { return static_cast<int>((p.i + kRun - 1) / kRun); }

__device__ inline Columns columns_of(const Params& p, int warp, int warps) {
    const int runs = runs_of(p), begin = runs * warp / warps;
    return {begin, runs * (warp + 1) / warps - begin, (runs + warps - 1) / warps};
}

// ---- x: a warp's part of v ----

// One lane's quarter of a run of one token.
template <class X, bool kGate>
__device__ inline Bits make_v(const Params& p, const Words<X, kQuarter>& x, const Words<X, kQuarter>& z,
                              const Pack<float, kQuarter>& w, float& squares) {
    Bits out;
#pragma unroll
    for (int k = 0; k < kQuarter; k += 2) {
        uint32_t both = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float raw = x[k + h], gated = kGate ? raw * silu(z[k + h]) : raw,
                        one = p.gate == Gate::before ? gated : raw;
            squares = fmaf(one, one, squares);
            both |= static_cast<uint32_t>(from_float<bf16>(gated * w.at[k + h]).bits) << (16 * h);
        }
        out.at[k / 2] = both;
    }
    return out;
}

// v[(run NT + t / 8) 32 + t % 8 4 + q], squares[t]. Groups of `width` lanes take a token each, A at once.
template <class X, int NT, int A, bool kGate>
__device__ inline void stage(const Params& p, const Columns& columns, Bits* v, float* squares) {
    const int lane = threadIdx.x % kWarp, quarters = columns.count * 4;
    int width = 1;
    while (width < quarters && width < kWarp) width *= 2;
    const int groups = kWarp / width, part = lane % width, group = lane / width;
    for (int t = lane; t < NT * kTileTokens; t += kWarp) squares[t] = 0.0f;
    __syncwarp();
    for (int first = 0; first < quarters; first += width) {
        const int quarter = first + part;
        const int j = columns.begin * kRun + quarter * kQuarter;
        const bool inside = quarter < quarters && j < p.i;
        const Pack<float, kQuarter> w = norm_weights<kQuarter>(p, inside ? j : p.i);
        for (int t0 = group; t0 - group < p.t; t0 += groups * A) {
            Words<X, kQuarter> x[A] = {};
            Words<X, kQuarter> z[kGate ? A : 1] = {};
#pragma unroll
            for (int a = 0; a < A; ++a) {
                const int t = t0 + a * groups;
                if (!inside || t >= p.t) continue;
                x[a] = load_words<kQuarter>(static_cast<const X*>(p.x) + t * p.x_stride + j);
                if constexpr (kGate)
                    z[a] = load_words<kQuarter>(static_cast<const X*>(p.z) + t * p.z_stride + j);
            }
#pragma unroll
            for (int a = 0; a < A; ++a) {
                const int t = t0 + a * groups;
                float sum = 0.0f;
                const Bits out = make_v<X, kGate>(p, x[a], z[kGate ? a : 0], w, sum);
                if (quarter < quarters && t < p.t)
                    v[(quarter / 4 * NT + t / kTileTokens) * kWarp + t % kTileTokens * 4 + quarter % 4] = out;
                if (p.groups == 0) continue;
                for (int offset = width / 2; offset > 0; offset /= 2)
                    sum += __shfl_xor_sync(kAllLanes, sum, offset);
                if (part == 0 && t < p.t) squares[t] += sum;
            }
        }
    }
    __syncwarp();
}

// ---- W ----

struct Weights {
    Bits upper[kU], lower[kU];
    const bf16 *upper_row, *lower_row;  // what is too much is computed, not stored
    int runs;                           // of this lane; 0 past the last tile

    __device__ void set_tile(const Params& p, const Columns& columns, int tile) {
        const int lane = threadIdx.x % kWarp;
        const int last = static_cast<int>(p.o) - 1, high = min(tile * kTileRows + lane / 4, last),
                  low = min(high + 8, last), j = columns.begin * kRun + lane % 4 * kQuarter;
        upper_row = static_cast<const bf16*>(p.weight) + high * p.weight_stride + j;
        lower_row = static_cast<const bf16*>(p.weight) + low * p.weight_stride + j;
        runs = columns.count;
        if (runs > 0 && j + (runs - 1) * kRun >= p.i) --runs;
        if (tile >= p.tasks) runs = 0;
    }
    // A run of the tile, zeros past the end.
    __device__ void fetch(int u, int run) {
        upper[u] = lower[u] = {};
        if (run >= runs) return;
        load(upper[u], upper_row + run * kRun);
        load(lower[u], lower_row + run * kRun);
    }
    __device__ static void load(Bits& b, const bf16* from) {
        const Words<bf16, kQuarter> w = load_words_once<kQuarter>(from);
#pragma unroll
        for (int k = 0; k < 4; ++k) b.at[k] = w.at[k];
    }

    template <int NT>
    __device__ void multiply_run(const Params& p, int u, const Bits* v, float (&c)[NT][4]) const {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            Bits x = {};
            if (n * kTileTokens + lane / 4 < p.t) x = v[n * kWarp + lane];
            multiply_bf16(c[n], upper[u].at[0], lower[u].at[0], upper[u].at[1], lower[u].at[1], x.at[0],
                          x.at[1]);
            multiply_bf16(c[n], upper[u].at[2], lower[u].at[2], upper[u].at[3], lower[u].at[3], x.at[2],
                          x.at[3]);
        }
    }
};

// The columns of this block, of its first tiles.
__device__ inline void prefetch(const Params& p, int rank, int ranks, int tile, int turn) {
    const int runs = runs_of(p);
    const int64_t begin = int64_t{runs * rank / ranks} * kRun,
                  end = min(int64_t{runs * (rank + 1) / ranks} * kRun, p.i), bytes = (end - begin) * 2;
    const int64_t n = threadIdx.x / kTileRows, row = (tile + n * turn) * kTileRows + threadIdx.x % kTileRows;
    if (bytes > 0 && n * kTileRows * bytes < p.ahead && row < p.o)
        prefetch_l2(static_cast<const bf16*>(p.weight) + row * p.weight_stride + begin,
                    static_cast<uint32_t>(bytes));
}

// ---- The kernel ----

template <int NT>
struct Sums {
    float warps[2][kWarps][NT * kTileTokens * kTokenStride], block[2][NT * kTileTokens * kTileRows];
    float squares[kWarps][NT * kTileTokens], block_squares[NT * kTileTokens];

    __device__ void put(int buffer, const float (&c)[NT][4]) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
        float* to = warps[buffer][threadIdx.x / kWarp];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                to[(n * kTileTokens + 2 * q + k % 2) * kTokenStride + g + k / 2 * 8] = c[n][k];
        }
    }
    __device__ float of_warps(int buffer, int t, int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += warps[buffer][w][t * kTokenStride + row];
        return sum;
    }
    __device__ float squares_of_warps(int t) const {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += squares[w][t];
        return sum;
    }
    // Of a cluster: its blocks' sums, put in order.
    __device__ void put_block(const Params& p, int buffer, bool first) {
        for (int e = static_cast<int>(threadIdx.x); e < p.t * kTileRows; e += kThreads)
            block[buffer][e] = of_warps(buffer, e / kTileRows, e % kTileRows);
        if (first && static_cast<int>(threadIdx.x) < p.t)
            block_squares[threadIdx.x] = squares_of_warps(threadIdx.x);
    }
    __device__ float of_ranks(int buffer, int t, int row, int ranks) const {
        float sum = 0.0f;
        for (int r = 0; r < ranks; ++r) sum += load_from_rank(&block[buffer][t * kTileRows + row], r);
        return sum;
    }
    __device__ float squares_of_ranks(int t, int ranks) const {
        float sum = 0.0f;
        for (int r = 0; r < ranks; ++r) sum += load_from_rank(&block_squares[t], r);
        return sum;
    }
};

// The call for rows first .. first + most of x alone.
template <class X>
__device__ inline Params rows_of(const Params& all, int first, int most) {
    Params p = all;
    p.t = min(all.t - first, most);
    p.x = static_cast<const X*>(all.x) + first * all.x_stride;
    p.z = static_cast<const X*>(all.z) + first * all.z_stride;
    const int64_t y = first * all.y_stride, state = first * all.conv.state_stride;
    if (all.y_is_bf16) {
        p.y = static_cast<bf16*>(all.y) + y;
    } else {
        p.y = static_cast<float*>(all.y) + y;
    }
    if (all.conv.slots != nullptr) {
        p.conv.slots += first;
    } else if (all.y_is_bf16) {
        p.conv.state = static_cast<bf16*>(all.conv.state) + state;
    } else {
        p.conv.state = static_cast<float*>(all.conv.state) + state;
    }
    return p;
}

// NT: tiles of 8 tokens. blockIdx.y: which NT 8 tokens. A: tokens that a lane fetches at once; 1 for very
// few.
template <class X, int NT, int A, bool kGate>
__global__ void __launch_bounds__(kThreads, A == 1 ? 3 : 2) Tiles(const __grid_constant__ Params all) {
    const Params p = rows_of<X>(all, static_cast<int>(blockIdx.y) * NT * kTileTokens, NT * kTileTokens);
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ Sums<NT> sums;
    allow_next();
    const int ranks = cluster_size(), rank = cluster_rank(), warp = threadIdx.x / kWarp;
    const Columns columns = columns_of(p, rank * kWarps + warp, ranks * kWarps);
    Bits* v = reinterpret_cast<Bits*>(memory) + static_cast<int64_t>(warp) * columns.most * NT * kWarp;
    const int turn = static_cast<int>(gridDim.x) / ranks, tiles = static_cast<int>(p.tasks);
    int tile = static_cast<int>(blockIdx.x) / ranks;
    Weights weights;
    weights.set_tile(p, columns, tile);
#pragma unroll
    for (int u = 0; u < kU; ++u) weights.fetch(u, u);
    prefetch(p, rank, ranks, tile, turn);
    // Whose sum this thread finishes.
    const int rows = kTileRows / ranks, t = static_cast<int>(threadIdx.x) / rows,
              row = rank * rows + static_cast<int>(threadIdx.x) % rows;
    const bool holds = t < p.t;
    Ahead ahead;
    if (holds) fetch_constants(p, tile * kTileRows + row, ahead);
    wait_for_inputs();
    if (holds) fetch_variables(p, tile * kTileRows + row, t, ahead);
    stage<X, NT, A, kGate>(p, columns, v, sums.squares[warp]);
    float divide = 1.0f;
    bool first = true;
    for (int buffer = 0; tile < tiles; tile += turn, buffer ^= 1, first = false) {
        float c[NT][4] = {};
        for (int base = 0; base < columns.most; base += kU) {
            const bool last = base + kU >= columns.most;
            if (last) weights.set_tile(p, columns, tile + turn);
            const int next = last ? 0 : base + kU;
#pragma unroll
            for (int u = 0; u < kU; ++u) {
                if (base + u < columns.count) weights.multiply_run<NT>(p, u, v + (base + u) * NT * kWarp, c);
                weights.fetch(u, next + u);
            }
        }
        sums.put(buffer, c);
        __syncthreads();
        float sum = 0.0f;
        if (ranks == 1) {
            if (holds) sum = sums.of_warps(buffer, t, row);
            if (holds && first && p.groups == 1) divide = sums.squares_of_warps(t);
        } else {
            sums.put_block(p, buffer, first);
            cluster_barrier();
            if (holds) sum = sums.of_ranks(buffer, t, row, ranks);
            if (holds && first && p.groups == 1) divide = sums.squares_of_ranks(t, ranks);
        }
        if (first && p.groups == 1) divide = rsqrtf(divide / static_cast<float>(p.i) + p.eps);
        if (!holds) continue;
        finish(p, tile * kTileRows + row, t, sum * divide, ahead);
        if (tile + turn >= tiles) continue;
        fetch_constants(p, (tile + turn) * kTileRows + row, ahead);
        fetch_variables(p, (tile + turn) * kTileRows + row, t, ahead);
    }
    if (ranks > 1) cluster_barrier();  // what others still read
}

// ---- Launching ----

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks of a cluster: as few as hold their part of x; more while multiprocessors are idle; twice as many
// where the last turn is emptier with fewer.
int64_t choose_ranks(const Params& p, int64_t least, int64_t slots) {
    const int64_t runs = divided(p.i, kRun);
    int64_t ranks = least;
    while (ranks < kMostCluster && p.tasks * ranks * 2 <= slots && runs > ranks * kWarps) ranks *= 2;
    const auto time = [&](int64_t r) {  // of all turns, in whole tiles times 8
        return divided(p.tasks, std::max<int64_t>(slots / r, 1)) * (kMostCluster / r);
    };
    if (ranks < kMostCluster && p.tasks * ranks > slots && runs > ranks * kWarps &&
        time(2 * ranks) * 10 < time(ranks) * 9)
        ranks *= 2;
    return ranks;
}

template <class X, int NT, int A, bool kGate>
bool launch(const Exec& ex, Params p) {
    const auto kernel = Tiles<X, NT, A, kGate>;
    static const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    check(allowed, kOp);
    const int64_t runs = divided(p.i, kRun), most = NT == 4 ? kMostRuns / 2 : kMostRuns;
    p.tasks = divided(p.o, kTileRows);
    p.ahead = kAhead;
    // Every thread finishes one sum of a tile at most.
    int64_t least = std::max(1, NT * kTileTokens * kTileRows / kThreads);
    while (least < kMostCluster && runs > least * kWarps * most) least *= 2;
    if (runs > least * kWarps * most) return false;
    const int64_t tokens = divided(p.t, NT * kTileTokens),
                  slots = std::max<int64_t>(kBlocks * ex.cuda->multiprocessors() / tokens, 1),
                  ranks = choose_ranks(p, least, slots),
                  blocks = std::min(p.tasks, std::max<int64_t>(slots / ranks, 1)) * ranks;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tokens));
    const auto shared =
        static_cast<size_t>(kWarps * divided(runs, ranks * kWarps) * NT * kWarp) * sizeof(Bits);
    launch_overlapped(ex, kOp, kernel, {grid, kThreads, shared, static_cast<unsigned>(ranks)}, p);
    return true;
}

template <class X, bool kGate>
bool choose(const Exec& ex, const Params& p) {
    if (p.t <= kTileTokens) return launch<X, 1, 4, kGate>(ex, p);
    if (p.t <= 2 * kTileTokens) return launch<X, 2, 4, kGate>(ex, p);
    return launch<X, 4, 4, kGate>(ex, p);
}

}  // namespace

bool tiles(const Exec& ex, const Params& p, bool x_is_bf16) {
    if (p.t < kFewestTokens || p.groups > 1 || std::max(p.o, p.i) > kMostSide) return false;
    if (p.t > kMostTokens && (p.t > kMostGrouped || p.o * p.i > kMostGroupedSize)) return false;
    if (!x_is_bf16) return choose<float, false>(ex, p);  // z has the weight's type, and x's
    return p.gate == Gate::none ? choose<bf16, false>(ex, p) : choose<bf16, true>(ex, p);
}

}  // namespace ssm::cuda::norm_linear_kernels
