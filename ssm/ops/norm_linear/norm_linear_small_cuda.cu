// A small weight (x_proj's) with 33 rows of x and more: tensor cores (m16n8k16), W and x in fragments
// straight from memory to registers. The columns are shared out to the warps of a cluster of blocks, so that
// each warp holds all it will ever need of W before its inputs are there, and asks for all of x in one go
// after. The sums of a block's warps go to the block of the cluster that finishes them, by stores that count
// at its barrier: no fence, and no block reads another's memory.
//
// Lane 4 g + q holds 8 neighbouring columns, those of quarter q of a run of 32, of rows g and g + 8 of W and
// of row g of x. Which columns of the product they are does not matter as long as W and x agree: every load
// is one of 16 bytes.
#include "ssm/core/cuda/bulk.cuh"
#include "ssm/core/cuda/cluster.cuh"
#include "ssm/core/cuda/products.cuh"
#include "ssm/ops/norm_linear/norm_linear_cuda.cuh"

namespace ssm::cuda::norm_linear_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTileRows = 16, kTileTokens = 8, kRun = 32, kQuarter = 8, kMostCluster = 8;
constexpr int kTiles = 2, kRows = kTiles * kTileRows;  // of W, of a block
constexpr int kRuns = 2;                               // of a warp at most
constexpr int kFewestTokens = 5, kMostTokens = 512;
constexpr int64_t kMostSize = 160 * 4096;  // of W
// With more columns the next kernel's blocks (mamba_step's, which ask for states) may begin only after the
// wait, so that what this one asks for does not stand behind that (measured: README.md).
constexpr int64_t kEarlyColumns = 2048;
constexpr int64_t kMostColumns = int64_t{kMostCluster} * kWarps * kRuns * kRun;

using Fragment = Words<bf16, kQuarter>;

__device__ inline void multiply(float (&c)[4], const Fragment& upper, const Fragment& lower,
                                const Fragment& x) {
#pragma unroll
    for (int k = 0; k < 4; k += 2)
        multiply_bf16(c, upper.at[k], lower.at[k], upper.at[k + 1], lower.at[k + 1], x.at[k], x.at[k + 1]);
}

// N: tiles of tokens of a block.
template <int N>
struct Shared {
    static constexpr int kTokens = N * kTileTokens, kStride = kRows + 4;  // without bank conflicts
    alignas(16) float warps[kWarps][kTokens * kStride];
    alignas(16) float ranks[kTokens * kRows];  // [rank][its tokens][row]
    uint64_t there;                            // all of `ranks` is
};

// The block's sums to the blocks of the cluster that finish them: each `each` tokens.
template <int N>
__device__ inline void send(Shared<N>& shared, int rank, int each) {
    using S = Shared<N>;
    constexpr int kPacks = kRows / 4;
    const int shift = __ffs(each) - 1;
    for (int e = static_cast<int>(threadIdx.x); e < S::kTokens * kPacks; e += kThreads) {
        const int token = e / kPacks, row = e % kPacks * 4, to = token >> shift;
        float4 sum = {};
#pragma unroll
        for (int v = 0; v < kWarps; ++v) {
            const float4 one = *reinterpret_cast<const float4*>(&shared.warps[v][token * S::kStride + row]);
            sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
        }
        const float* at = shared.ranks + (rank * each + token - to * each) * kRows + row;
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::
                "r"(address_in_rank(at, to)),
            "r"(__float_as_uint(sum.x)), "r"(__float_as_uint(sum.y)), "r"(__float_as_uint(sum.z)),
            "r"(__float_as_uint(sum.w)), "r"(address_in_rank(&shared.there, to))
            : "memory");
    }
}

// The sums of `each` tokens from first_token on, of all blocks, in order.
template <int N>
__device__ inline void finish_all(const Params& p, Shared<N>& shared, int ranks, int each, int first_row,
                                  int first_token) {
    Ahead ahead;
    wait_barrier(&shared.there, 0);
    for (int e = static_cast<int>(threadIdx.x); e < each * kRows; e += kThreads) {
        const int row = first_row + e % kRows, token = first_token + e / kRows;
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kMostCluster; ++r)
            if (r < ranks) sum += shared.ranks[r * each * kRows + e];
        fetch_constants(p, row, ahead);
        if (row < p.o && token < p.t) fetch_variables(p, row, token, ahead);
        finish(p, row, token, sum, ahead);
    }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 2) Small(const __grid_constant__ Params p) {
    using S = Shared<N>;
    extern __shared__ __align__(16) unsigned char memory[];
    S& shared = *reinterpret_cast<S*>(memory);
    const bool early = p.i <= kEarlyColumns;
    if (early) allow_next();
    const int ranks = cluster_size(), rank = cluster_rank();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4;
    if (threadIdx.x == 0) {
        init_barrier(&shared.there, 1);
        expect_bytes(&shared.there, static_cast<uint32_t>(sizeof(shared.ranks)));
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    const int runs = static_cast<int>((p.i + kRun - 1) / kRun), part = rank * kWarps + warp,
              parts = ranks * kWarps, begin = runs * part / parts, count = runs * (part + 1) / parts - begin;
    const int first_row = static_cast<int>(blockIdx.x) / ranks * kRows,
              first_token = static_cast<int>(blockIdx.y) * S::kTokens;
    const int j = begin * kRun + lane % 4 * kQuarter;
    // Rows that there are not: the last, computed, not stored. Columns: zeros.
    const int last = static_cast<int>(p.o) - 1;
    bool inside[kRuns];
#pragma unroll
    for (int u = 0; u < kRuns; ++u) inside[u] = u < count && j + u * kRun < p.i;
    Fragment w[kRuns][kTiles][2] = {};
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = min(first_row + m * kTileRows + h * 8 + g, last);
            const bf16* from = static_cast<const bf16*>(p.weight) + row * p.weight_stride + j;
#pragma unroll
            for (int u = 0; u < kRuns; ++u)
                if (inside[u]) w[u][m][h] = load_words_once<kQuarter>(from + u * kRun);
        }
    }
    wait_for_inputs();
    if (!early) allow_next();
    Fragment x[kRuns][N] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int token = min(first_token + n * kTileTokens + g, p.t - 1);
        const bf16* from = static_cast<const bf16*>(p.x) + token * p.x_stride + j;
#pragma unroll
        for (int u = 0; u < kRuns; ++u)
            if (inside[u]) x[u][n] = load_words_once<kQuarter>(from + u * kRun);
    }
    float c[kTiles][N][4] = {};
#pragma unroll
    for (int u = 0; u < kRuns; ++u)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int m = 0; m < kTiles; ++m) multiply(c[m][n], w[u][m][0], w[u][m][1], x[u][n]);
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                shared.warps[warp][(n * kTileTokens + lane % 4 * 2 + k % 2) * S::kStride + m * kTileRows + g +
                                   k / 2 * 8] = c[m][n][k];
    __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all of the cluster have begun
    const int each = S::kTokens / ranks;
    send(shared, rank, each);
    finish_all(p, shared, ranks, each, first_row, first_token + rank * each);
}

template <int N>
dim3 blocks(const Params& p) {
    const auto divided = [](int64_t n, int64_t by) { return static_cast<unsigned>((n + by - 1) / by); };
    return {divided(p.o, kRows) * kMostCluster, divided(p.t, Shared<N>::kTokens)};
}

template <int N>
void launch(const Exec& ex, const Params& p) {
    static_assert(Shared<N>::kTokens % kMostCluster == 0 && sizeof(Shared<N>) <= 48 << 10);
    launch_overlapped(ex, kOp, Small<N>, {blocks<N>(p), kThreads, sizeof(Shared<N>), kMostCluster}, p);
}

}  // namespace

bool small(const Exec& ex, const Params& p, bool x_is_bf16) {
    if (!x_is_bf16 || p.groups != 0 || p.gate != Gate::none) return false;
    if (p.t < kFewestTokens || p.t > kMostTokens || p.o * p.i > kMostSize || p.i > kMostColumns) return false;
    // Blocks of more tokens read W less often; they have to be enough for the multiprocessors.
    const dim3 large = blocks<4>(p);
    if (int64_t{large.x} * large.y >= ex.cuda->multiprocessors()) {
        launch<4>(ex, p);
    } else {
        launch<2>(ex, p);
    }
    return true;
}

}  // namespace ssm::cuda::norm_linear_kernels
