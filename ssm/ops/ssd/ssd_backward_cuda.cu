// CUDA kernels of ssd_backward. Walk: S onwards from the saved states and its gradient Z backwards, both left
// in scratch for each tile. Chunk: a block has one tile of tokens and one group and goes through the heads of
// the group, all local; few tiles are cut into slices of heads. Finish: from sums over a tile's pairs to the
// gradients of its time steps. Reduce: sums over slices and tiles in a fixed order.
#include "ssm/ops/ssd/ssd_backward_chunk.cuh"

namespace ssm::cuda {
namespace {

constexpr int kReduceThreads = 256;

// ---- Finish
// A lane's two tokens, from sums over all parts of a head.
struct TokenGradients {
    float own[2] = {}, xg[2] = {};  // of l_j: what token j gives as a row and takes as a column; x . grad X
    float ends = 0.0f, A = 0.0f, through = 0.0f, pairs = 0.0f, D = 0.0f;
};
// grad A is summed apart, weighted by the times between the two ends of each term: most of the suffix sums
// would cancel in it.
__device__ inline void add_part(TokenGradients& g, const Partial& from, const Times& times) {
    const int lane = threadIdx.x % kWarp, i = 2 * lane;
    const float time = times.s[kQ - 1];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const Pack<float, 4> token = from.token[i + k];
        const float row = token.at[0], column = token.at[1], c = token.at[2], xz = token.at[3],
                    dt = times.dt[i + k], s = times.s[i + k];
        g.xg[k] += column + xz;
        g.own[k] += row + c - dt * (column + xz);
        g.ends += dt * xz;
        g.A += s * c + (time - s) * (dt * xz);
    }
    g.through += from.inner;
    g.pairs += from.pairs;
}

// A warp per tile and head: from the gradients of l to those of dt and A. Suffix sums of those of l are those
// of dt A; the end's gradient reaches every token.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) Finish(const __grid_constant__ BackwardParams<T> a) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kReduceThreads / kWarp) + threadIdx.x / kWarp;
    if (unit >= a.tiles * a.heads) return;
    const int64_t h = unit % a.heads, index = unit / a.heads;
    const Tile tile = tile_at(a.tiling, index);
    const int lane = threadIdx.x % kWarp, i = 2 * lane;
    const Times& times = a.times[unit];
    TokenGradients g;
    for (int64_t part = 0; part < a.ptiles; ++part) {
        const Partial& first = a.partial[unit * a.ptiles + part];
        add_part(g, first, times);
        g.D += first.D[lane] + first.D[lane + kWarp];
        for (int band = 1; band < a.bands; ++band)
            add_part(g, (&first)[band * a.tiles * a.heads * a.ptiles], times);
    }
    g.through *= times.e[kQ - 1];
    const float ends = warp_sum(g.ends) + g.through,
                grad_A = warp_sum(g.A) + g.pairs + times.s[kQ - 1] * g.through;
    double sum = static_cast<double>(g.own[0]) + g.own[1];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_down_sync(kAllLanes, sum, offset);
        if (lane + offset < kWarp) sum += other;
    }
    const float grad_a[2] = {static_cast<float>(sum + ends), static_cast<float>(sum - g.own[0] + ends)};
    const float A = a.in.A.data[h * a.in.A.stride];
    float bias = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        if (i + k >= tile.length) continue;
        const int64_t t = tile.begin + i + k;
        const float grad = (g.xg[k] + A * grad_a[k]) * slope_of_raw(a.in, raw_dt(a.in, t, h));
        bias += grad;
        if (a.grad.dt.data == nullptr) continue;
        T& to = a.grad.dt.data[t * a.grad.dt.stride + h];
        to = from_float<T>(a.grad.set.dt ? grad : to_float(to) + grad);
    }
    bias = warp_sum(bias);
    const float D = warp_sum(g.D);
    if (lane != 0) return;
    const int64_t at = h * a.tiles + index;
    a.A[at] = grad_A;
    a.dt_bias[at] = bias;
    a.D[at] = D;
}

// ---- Reduce
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceSlices(const __grid_constant__ BackwardParams<T> a) {
    const int64_t width = a.groups * a.n, count = a.tokens * width;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
    if (i >= count) return;
    const auto give = [&](const View<T, 3>& grad, const float* partial, bool set) {
        if (grad.data == nullptr) return;
        float sum = 0.0f;
        for (int64_t s = 0; s < a.slices; ++s) sum += partial[s * count + i];
        T& to = grad.data[i / width * grad.stride + i % width];
        to = from_float<T>(set ? sum : to_float(to) + sum);
    };
    give(a.grad.B, a.B, a.grad.set.B);
    give(a.grad.C, a.C, a.grad.set.C);
}

// Of element j of a head, the sum over tiles; by all threads.
template <class T>
__device__ void reduce_D(const BackwardParams<T>& a, int64_t h, float* columns) {
    const int64_t column = threadIdx.x % kP;
    for (int64_t tile = 0; tile < a.ptiles; ++tile) {
        float sum = 0.0f;
        for (int64_t c = threadIdx.x / kP; c < a.tiles; c += kReduceThreads / kP)
            sum += a.partial[(c * a.heads + h) * a.ptiles + tile].D[column];
        __syncthreads();
        columns[threadIdx.x] = sum;
        __syncthreads();
        const int64_t j = tile * kP + threadIdx.x;
        if (threadIdx.x >= kP || j >= a.p) continue;
        sum = 0.0f;
        for (int k = 0; k < kReduceThreads / kP; ++k) sum += columns[k * kP + threadIdx.x];
        a.grad.D.data[h * a.grad.D.stride + j] += sum;
    }
}

// A block per head: grad A, grad dt_bias, grad D.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceHead(const __grid_constant__ BackwardParams<T> a) {
    __shared__ float scratch[kReduceThreads / kWarp], columns[kReduceThreads];
    const int64_t h = blockIdx.x;
    float sum_A = 0.0f, sum_dt = 0.0f, sum_D = 0.0f;
    for (int64_t c = threadIdx.x; c < a.tiles; c += kReduceThreads) {
        sum_A += a.A[h * a.tiles + c];
        sum_dt += a.dt_bias[h * a.tiles + c];
        sum_D += a.D[h * a.tiles + c];
    }
    sum_A = block_sum(sum_A, scratch);
    sum_dt = block_sum(sum_dt, scratch);
    sum_D = block_sum(sum_D, scratch);
    if (a.grad.D.data != nullptr && a.grad.D.shape[1] > 1) reduce_D(a, h, columns);
    if (threadIdx.x != 0) return;
    if (a.grad.A.data != nullptr) a.grad.A.data[h * a.grad.A.stride] += sum_A;
    if (a.grad.dt_bias.data != nullptr) a.grad.dt_bias.data[h * a.grad.dt_bias.stride] += sum_dt;
    if (a.grad.D.data != nullptr && a.grad.D.shape[1] == 1) a.grad.D.data[h * a.grad.D.stride] += sum_D;
}

// ---- launch
constexpr std::string_view kOp = "ssd_backward";

template <class T, int N>
void chunk_kernel(const Exec& ex, const BackwardParams<T>& a) {
    allow_shared(Chunk<T, N>, sizeof(ChunkTiles<T, N>), kOp);
    const dim3 blocks(static_cast<unsigned>(a.tiles), static_cast<unsigned>(a.groups * a.slices));
    Chunk<T, N><<<blocks, kThreads, sizeof(ChunkTiles<T, N>), stream_of(ex)>>>(a);
    check_launch(kOp);
}

template <class T>
void reduce(const Exec& ex, const BackwardParams<T>& a) {
    const cudaStream_t stream = stream_of(ex);
    if (a.slices > 1 && (a.grad.B || a.grad.C)) {
        ReduceSlices<T>
            <<<blocks_for(a.tokens * a.groups * a.n, kReduceThreads), kReduceThreads, 0, stream>>>(a);
        check_launch(kOp);
    }
    Finish<T><<<blocks_for(a.tiles * a.heads, kReduceThreads / kWarp), kReduceThreads, 0, stream>>>(a);
    check_launch(kOp);
    ReduceHead<T><<<static_cast<unsigned>(a.heads), kReduceThreads, 0, stream>>>(a);
    check_launch(kOp);
}

template <class T>
BackwardParams<T> make_params(const Exec& ex, const SsdInputs<T>& in, const TilingOnDevice& tiling,
                              View<const T, 3> grad_y, const SsdGradients<T>& grad) {
    BackwardParams<T> a{in, grad_y, grad, tiling.get()};
    a.heads = in.x.shape[1];
    a.p = in.x.shape[2];
    a.groups = in.B.shape[1];
    a.n = in.B.shape[2];
    a.tokens = in.x.shape[0];
    a.tiles = tiling.tiles();
    a.ptiles = tiles_of(a.p, kP);
    a.bands = static_cast<int>(tiles_of(a.n, kBand));
    a.slices = slices_for(a.tiles * a.groups, a.heads / a.groups * a.ptiles, ex.cuda->multiprocessors());
    a.packed_x = packed16(in.x.data, in.x.stride, in.x.shape);
    a.packed_B = packed16(in.B.data, in.B.stride, in.B.shape);
    a.packed_C = packed16(in.C.data, in.C.stride, in.C.shape);
    a.packed_grad_y = packed16(grad_y.data, grad_y.stride, grad_y.shape);
    a.packed4_x = packable(grad.x.data, grad.x.stride, 4) && a.p % 4 == 0;
    a.paired_B = packable(grad.B.data, grad.B.stride, 2) && a.n % 2 == 0;
    a.paired_C = packable(grad.C.data, grad.C.stride, 2) && a.n % 2 == 0;
    return a;
}

// S from the begin of each chunk onwards, Z from the end of each sequence backwards, side by side.
template <class T, int N>
void walk_both(const Exec& ex, const BackwardParams<T>& a, const TilingOnDevice& tiling,
               View<const float, 4> chunk_states, View<const float, 4> grad_final_state, T* S, T* Z) {
    const int64_t parts = a.heads * a.ptiles;
    WalkParams<T> w{a.tiling, a.times, a.heads, a.ptiles, a.groups, a.p, a.n, a.n - a.n0};
    Walks<T>& back = w.walks[0];
    back.rows = a.grad_y;
    back.columns = from_column(a.in.C, a.n0);
    back.packed_rows = a.packed_grad_y;
    back.packed_columns = a.packed_C;
    back.backwards = true;
    back.add = true;
    back.from = from_column(grad_final_state, a.n0);
    back.last = from_column(a.grad.initial_state, a.n0);
    back.states = Z;
    back.count = a.tiling.sequences.count * parts;
    Walks<T>& on = w.walks[1];
    on.rows = a.in.x;
    on.columns = from_column(a.in.B, a.n0);
    on.packed_rows = a.packed_x;
    on.packed_columns = a.packed_B;
    on.by_chunk = true;
    on.from = from_column(chunk_states, a.n0);
    on.states = S;
    on.count = tiling.chunks() * parts;
    walk<T, N>(ex, w, "ssd_backward");
}

template <class T, int N>
void backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
              View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
              int64_t chunk) {
    const TilingOnDevice tiling(ex, in.cu_seqlens, chunk);
    BackwardParams<T> a = make_params(ex, in, tiling, grad_y, grad);
    const auto size = [](int64_t count) { return static_cast<size_t>(std::max<int64_t>(count, 1)); };
    const int64_t units = a.tiles * a.heads, states = units * a.ptiles * kP * N;
    const int64_t sums = a.slices > 1 ? a.slices * a.tokens * a.groups * a.n : 0;
    const Scratch<Times> times(ex, size(units));
    const Scratch<Partial> partial(ex, size(a.bands * units * a.ptiles));
    const Scratch<T> S(ex, size(states)), Z(ex, size(states));
    const Scratch<float> A(ex, size(units)), dt_bias(ex, size(units)), D(ex, size(units)), B(ex, size(sums)),
        C(ex, size(sums));
    a.times = times.data();
    a.S = S.data();
    a.Z = Z.data();
    a.partial = partial.data();
    a.A = A.data();
    a.dt_bias = dt_bias.data();
    a.D = D.data();
    a.B = B.data();
    a.C = C.data();
    make_times(ex, in, a.tiling, a.tiles, times.data(), "ssd_backward");
    BackwardParams<T> band = a;
    for (int i = 0; i < a.bands; ++i) {
        walk_both<T, N>(ex, band, tiling, chunk_states, grad_final_state, S.data(), Z.data());
        if (a.tokens > 0) chunk_kernel<T, N>(ex, band);
        band.n0 += N;
        band.in.D = {};  // D grad y is there; the rest is added
        band.grad.set.x = false;
    }
    if (a.tokens > 0) reduce(ex, a);
}

}  // namespace

template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  int64_t chunk) {
    if (in.B.shape[2] <= 64) {
        backward<T, 64>(ex, in, chunk_states, grad_y, grad_final_state, grad, chunk);
    } else {
        backward<T, kBand>(ex, in, chunk_states, grad_y, grad_final_state, grad, chunk);
    }
}

template void ssd_backward(const Exec&, const SsdInputs<float>&, View<const float, 4>, View<const float, 3>,
                           View<const float, 4>, const SsdGradients<float>&, int64_t);
template void ssd_backward(const Exec&, const SsdInputs<bf16>&, View<const float, 4>, View<const bf16, 3>,
                           View<const float, 4>, const SsdGradients<bf16>&, int64_t);

}  // namespace ssm::cuda
