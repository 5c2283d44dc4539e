// CUDA kernels of ssd. Walk leaves the state before each tile in scratch; Outputs has one tile
// of tokens and one group per block and goes through the heads of the group.
#include "ssm/ops/ssd/ssd_walk.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct OutputParams {
    SsdInputs<T> in;
    View<T, 3> y;
    Tiling tiling;
    const Times* times;  // [tiles heads]
    const T* states;     // [tiles, heads * ptiles, kP, N]
    int64_t ptiles, tiles, slices;
    int n0, bands;  // the first of the columns that Outputs is at; how many times it is launched
    bool packed_x, packed_B, packed_C, packed_y;  // for 16 bytes; y: for fours
};

template <class T, int N>
struct OutputTile {
    T x[kQ * kLdP], S[kP * (N + kPad)];
    Times times;
    float D[kP];
};
// One tile is used while the next head's arrives.
template <class T, int N>
struct OutputTiles {
    OutputTile<T, N> in[2];
    T C[kQ * (N + kPad)];
};

// The warp's 16 tokens and half of the columns. Warps of one tensor core have different tokens: the later
// they are, the more products.
__device__ inline int own_row() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    return (warp < 4 ? warp : 7 - warp) * 16;
}
__device__ inline int own_column() { return static_cast<int>(threadIdx.x) / kWarp / 4 * 32; }

template <class T, int N>
__device__ void fetch(OutputTile<T, N>& m, const OutputParams<T>& a, int64_t index, const Tile& tile,
                      int64_t v) {
    const int64_t heads = a.in.x.shape[1], p = a.in.x.shape[2];
    const Part part = part_at(v, a.ptiles, p);
    copy_tile<kQ, kP, kThreads>(m.x, a.in.x.data + tile.begin * a.in.x.stride + part.h * p + part.p0,
                                a.in.x.stride, tile.length, part.columns, a.packed_x);
    copy_tile<kP, N, kThreads>(m.S, a.states + (index * heads * a.ptiles + v) * (kP * N), N, kP, N, true);
    copy_times(m.times, a.times[index * heads + part.h]);
    copy_D(m.D, a.in.D, part, kThreads - kP);
}

// The warp's rows of M = exp(l_i - l_j) dt_j C B^T, columns j0 .. j0 + 16, on and below the diagonal; as the
// left operand of a product.
template <class T>
__device__ inline Left<T> pairs(const Times& times, const Sum& G, int row, int j0) {
    const float l[2] = {times.l[row + row_of(0)], times.l[row + row_of(2)]};
    Sum M;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int j = j0 + column_of(e);
        const float value = G.v[e] * decay_of(l[e / 2 % 2] - times.l[j]) * times.dt[j];
        M.v[e] = j <= row + row_of(e) ? value : 0.0f;
    }
    return as_left<T>(M);
}

// y + D x, the warp's block at column; or added to y.
template <bool kAdd, class T, int N>
__device__ void write_y(const OutputParams<T>& a, const OutputTile<T, N>& m, const Sum& Y, const Tile& tile,
                        const Part& part, int column) {
    const int j = column + column_of_four();
    const auto write = [&](int i, Four f) {
        if (i >= tile.length) return;
        const Pack<T, 4> x = load_pack<4>(m.x + i * kLdP + j);
        const Pack<float, 4> D = load_pack<4>(m.D + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) f.v[k] += D.at[k] * to_float(x.at[k]);
        T* const to = a.y.data + (tile.begin + i) * a.y.stride + part.h * a.in.x.shape[2] + part.p0 + j;
        give_four(to, f, part.columns - j, !kAdd, a.packed_y);
    };
    const int row = own_row() + row_of(0);
    write(row, four_of<false>(Y));
    write(row + 8, four_of<true>(Y));
}

// What a block keeps of its tokens for all heads: C as left operands and G = C B^T.
template <class T, int N>
struct Own {
    Left<T> C[N / 16];
    Sum G[kQ / 16];
};

// y = exp(l) C S^T + M x + D x of a tile and the heads of a group, or a slice of them. The first N columns of
// a state make all but the other columns' C S^T; kRest: that of those from a.n0 on is added.
template <class T, int N, bool kRest>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    Outputs(const __grid_constant__ OutputParams<T> a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<OutputTiles<T, N>*>(memory);
    constexpr int kLdN = N + kPad;
    const int parts = static_cast<int>(a.in.x.shape[1] / a.in.B.shape[1] * a.ptiles),
              slices = static_cast<int>(a.slices), group = static_cast<int>(blockIdx.y) / slices,
              slice = static_cast<int>(blockIdx.y) % slices,
              last = group * parts + parts * (slice + 1) / slices;
    int v = group * parts + parts * slice / slices;
    const Tile tile = tile_at(a.tiling, blockIdx.x);
    const int n = static_cast<int>(a.in.B.shape[2]), row = own_row(), column = own_column();
    fetch(m.in[0], a, blockIdx.x, tile, v);
    const int newest = kRest ? -1 : row;  // no input beyond its block
    Own<T, N> own;
    T* const B = m.in[1].S;
    for (int n0 = kRest ? a.n0 : (a.bands - 1) * N;; n0 -= N) {  // G is the sum over all columns
        const int64_t at = group * n + n0;
        copy_tile<kQ, N, kThreads>(m.C, a.in.C.data + tile.begin * a.in.C.stride + at, a.in.C.stride,
                                   tile.length, n - n0, a.packed_C);
        if (!kRest)
            copy_tile<kQ, N, kThreads>(B, a.in.B.data + tile.begin * a.in.B.stride + at, a.in.B.stride,
                                       tile.length, n - n0, a.packed_B);
        wait_copies();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < N / 16; ++k) own.C[k] = left<false>(m.C, kLdN, row, 16 * k);
#pragma unroll
        for (int j = 0; j < kQ / 16; ++j) {
            if (16 * j > newest) break;
#pragma unroll
            for (int k = 0; k < N / 16; ++k)
                multiply(own.G[j], own.C[k], right<false>(B, kLdN, 16 * k, 16 * j));
        }
        if (kRest || n0 == 0) break;
        __syncthreads();
    }
    for (int now = 0; v < last; ++v, now = 1 - now) {
        const OutputTile<T, N>& in = m.in[now];
        wait_copies();
        __syncthreads();  // this head's tile is there, the other one is read
        if (v + 1 < last) fetch(m.in[1 - now], a, blockIdx.x, tile, v + 1);
        Sum Y[2];
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
#pragma unroll
            for (int c = 0; c < 2; ++c)
                multiply(Y[c], own.C[k], right<false>(in.S, kLdN, 16 * k, column + 16 * c));
        }
        const float e[2] = {in.times.e[row + row_of(0)], in.times.e[row + row_of(2)]};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            Y[0].v[i] *= e[i / 2 % 2];
            Y[1].v[i] *= e[i / 2 % 2];
        }
#pragma unroll
        for (int j = 0; j < kQ / 16; ++j) {
            if (16 * j > newest) break;
            const Left<T> M = pairs<T>(in.times, own.G[j], row, 16 * j);
#pragma unroll
            for (int c = 0; c < 2; ++c) multiply(Y[c], M, right<true>(in.x, kLdP, 16 * j, column + 16 * c));
        }
        const Part part = part_at(v, a.ptiles, a.in.x.shape[2]);
        write_y<kRest>(a, in, Y[0], tile, part, column);
        write_y<kRest>(a, in, Y[1], tile, part, column + 16);
    }
}

template <class T, int N, bool kRest>
void outputs(const Exec& ex, const OutputParams<T>& p) {
    constexpr size_t kBytes = sizeof(OutputTiles<T, N>);
    allow_shared(Outputs<T, N, kRest>, kBytes, "ssd");
    const dim3 blocks(static_cast<unsigned>(p.tiles), static_cast<unsigned>(p.in.B.shape[1] * p.slices));
    Outputs<T, N, kRest><<<blocks, kThreads, kBytes, stream_of(ex)>>>(p);
    check_launch("ssd");
}

template <class T, int N>
void forward(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
             View<float, 4> chunk_states, int64_t chunk) {
    const int64_t heads = in.x.shape[1], groups = in.B.shape[1], ptiles = tiles_of(in.x.shape[2], kP);
    const TilingOnDevice tiling(ex, in.cu_seqlens, chunk_states ? chunk : kQ);
    const int64_t tiles = tiling.tiles();
    const auto size = [](int64_t count) { return static_cast<size_t>(std::max<int64_t>(count, 1)); };
    const Scratch<Times> times(ex, size(tiles * heads));
    const Scratch<T> states(ex, size(tiles * heads * ptiles * kP * N));
    make_times(ex, in, tiling.get(), tiles, times.data(), "ssd");
    const bool packed_x = packed16(in.x.data, in.x.stride, in.x.shape),
               packed_B = packed16(in.B.data, in.B.stride, in.B.shape);
    const int bands = static_cast<int>(tiles_of(in.B.shape[2], kBand));
    OutputParams<T> o{in, y, tiling.get(), times.data(), states.data(), ptiles, tiles};
    o.slices = slices_for(tiles * groups, heads / groups * ptiles,
                          ex.cuda->multiprocessors() * (sizeof(T) == 2 ? 2 : 1));
    o.bands = bands;
    o.packed_x = packed_x;
    o.packed_B = packed_B;
    o.packed_C = packed16(in.C.data, in.C.stride, in.C.shape);
    o.packed_y = packable(y.data, y.stride, 4) && y.shape[2] % 4 == 0;
    for (int n0 = 0; n0 < bands * N; n0 += N) {
        WalkParams<T> w{tiling.get(), times.data(),  heads,         ptiles,
                        groups,       in.x.shape[2], in.B.shape[2], in.B.shape[2] - n0};
        Walks<T>& on = w.walks[0];
        on.rows = in.x;
        on.columns = from_column(in.B, n0);
        on.packed_rows = packed_x;
        on.packed_columns = packed_B;
        on.from = from_column(in.initial_state, n0);
        on.saved = from_column(chunk_states, n0);
        on.last = from_column(final_state, n0);
        on.states = states.data();
        on.count = (static_cast<int64_t>(in.cu_seqlens.size()) - 1) * heads * ptiles;
        walk<T, N>(ex, w, "ssd");
        o.n0 = n0;
        if (tiles == 0) continue;
        if (n0 == 0) {
            outputs<T, N, false>(ex, o);
        } else if constexpr (N == kBand) {
            o.in.D = {};  // D x is there
            outputs<T, N, true>(ex, o);
        }
    }
}

}  // namespace

template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, int64_t chunk) {
    if (in.B.shape[2] <= 64) {
        forward<T, 64>(ex, in, y, final_state, chunk_states, chunk);
    } else {
        forward<T, kBand>(ex, in, y, final_state, chunk_states, chunk);
    }
}

template void ssd(const Exec&, const SsdInputs<float>&, View<float, 3>, View<float, 4>, View<float, 4>,
                  int64_t);
template void ssd(const Exec&, const SsdInputs<bf16>&, View<bf16, 3>, View<float, 4>, View<float, 4>,
                  int64_t);

}  // namespace ssm::cuda
