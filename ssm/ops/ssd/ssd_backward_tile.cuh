// Of ssd_backward on CUDA: the parameters, the tiles of a chunk of one head, and the products of the kernel
// Chunk (ssd_backward_chunk.cuh) on them. Private; included once.
#pragma once

#include "ssm/ops/ssd/ssd_walk.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 512, kQuarters = 4;

// What Chunk leaves of a tile and a part to Finish: of each token the sums row, column, c and xz (see
// Finish), the columns' of grad D, <Z, S>, and the pairs' share of grad A.
struct alignas(16) Partial {
    Pack<float, 4> token[kQ];
    float D[kP], inner, pairs;
};

template <class T>
struct BackwardParams {
    SsdInputs<T> in;
    View<const T, 3> grad_y;
    SsdGradients<T> grad;
    Tiling tiling;
    int64_t ptiles, heads, p, groups, n, tokens, tiles, slices;
    const Times* times;  // [tiles heads]
    const T *S, *Z;      // [tiles, heads * ptiles, kP, N]: entering a tile; the gradient of what leaves it
    Partial* partial;    // [tiles, heads * ptiles]
    float *A, *dt_bias, *D;  // [heads tiles]
    float *B, *C;            // [slices tokens groups n] if slices > 1
    bool packed_x, packed_B, packed_C, packed_grad_y;
    bool packed4_x, paired_B, paired_C;  // of the gradients: four or two neighbours lie in one aligned word
};

// ---- Chunk. Warp w has the tokens 16 (w % 4) .. and one quarter, w / 4, of the columns of each product.
template <class T, int N>
struct PartTile {
    T x[kQ * kLdP], grad_y[kQ * kLdP], S[kP * (N + kPad)], Z[kP * (N + kPad)];
    Times times;
    float D[kP];
};
struct TokenSums {
    float row[kQuarters][kQ], column[4][kQ], c[kQuarters][kQ], xz[kQuarters][kQ];
    float D[4][kP], inner[kThreads / kWarp], pairs[kThreads / kWarp];
};
// bf16: a head's tile arrives while the one before is used; f32 has no room for two.
template <class T, int N>
struct ChunkTiles {
    static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
    PartTile<T, N> in[kStages];
    T B[kQ * (N + kPad)], C[kQ * (N + kPad)], M[kQ * kLdQ];
    TokenSums sums[2];
};

struct Where {
    int64_t tile, begin, group, first_part, last_part, slice;
    int length;
};
template <class T>
__device__ Where where_of_block(const BackwardParams<T>& a) {
    Where w{};
    w.tile = blockIdx.x;
    const Tile tile = tile_at(a.tiling, w.tile);
    w.begin = tile.begin;
    w.length = tile.length;
    w.group = blockIdx.y / a.slices;
    w.slice = blockIdx.y % a.slices;
    const int64_t parts = a.heads / a.groups * a.ptiles;
    w.first_part = w.group * parts + parts * w.slice / a.slices;
    w.last_part = w.group * parts + parts * (w.slice + 1) / a.slices;
    return w;
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}
// Two sums of a lane, of the rows g and g + 8 of its block, to token sums.
__device__ inline void store_rows(float* to, int row, float a, float b) {
    a = quad_sum(a);
    b = quad_sum(b);
    if (threadIdx.x % 4 == 0) {
        to[row + row_of(0)] = a;
        to[row + row_of(2)] = b;
    }
}

template <class T, int N>
__device__ void fetch_part(PartTile<T, N>& m, const BackwardParams<T>& a, const Where& w, int64_t v) {
    const Part part = part_at(v, a.ptiles, a.p);
    const int64_t at = part.h * a.p + part.p0, state = (w.tile * a.heads * a.ptiles + v) * (kP * N);
    copy_tile<kQ, kP, kThreads>(m.x, a.in.x.data + w.begin * a.in.x.stride + at, a.in.x.stride, w.length,
                                part.columns, a.packed_x);
    copy_tile<kQ, kP, kThreads>(m.grad_y, a.grad_y.data + w.begin * a.grad_y.stride + at, a.grad_y.stride,
                                w.length, part.columns, a.packed_grad_y);
    copy_tile<kP, N, kThreads>(m.S, a.S + state, N, kP, N, true);
    copy_tile<kP, N, kThreads>(m.Z, a.Z + state, N, kP, N, true);
    copy_times(m.times, a.times[w.tile * a.heads + part.h]);
    copy_D(m.D, a.in.D, part, kThreads - kP);
}

// Sums over the rows of the warp's block of what its lanes have in columns column_of(0, 1, 4, 5), to 16 sums.
// Halves are swapped, so that each sum is computed once.
__device__ inline void store_columns(float* to, const float (&v)[4]) {
    const int lane = threadIdx.x % kWarp;
    const bool far = (lane & 16) != 0, odd = (lane & 8) != 0;
    const float a = (far ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, far ? v[0] : v[2], 16),
                b = (far ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, far ? v[1] : v[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    if ((lane & 4) == 0) to[lane % 4 * 2 + odd + far * 8] = sum;
}

// M on the triangle to memory; of grad M o M, all in f32, the rows' and columns' sums, and that of all
// weighted by the time between the two tokens, which is their share of grad A. grad G.
template <class T, int N>
__device__ void pairs(const PartTile<T, N>& m, T* to, TokenSums& sums, const Sum& G, Sum& grad_G) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
    Sum grad_M, M;
    if (quarter <= block) {
#pragma unroll
        for (int k = 0; k < kP; k += 16)
            multiply(grad_M, left<false>(m.grad_y, kLdP, row, k), right<false>(m.x, kLdP, k, 16 * quarter));
    }
    float rows[2] = {}, columns[4] = {}, all = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int i = row + row_of(e), j = 16 * quarter + column_of(e);
        if (j > i) continue;
        const float decay = __expf(m.times.l[i] - m.times.l[j]), dt = m.times.dt[j];
        M.v[e] = decay * G.v[e];
        grad_G.v[e] += decay * (dt * grad_M.v[e]);
        const float both = grad_M.v[e] * M.v[e];
        columns[e % 2 + e / 4 * 2] += both;
        rows[e / 2 % 2] = fmaf(dt, both, rows[e / 2 % 2]);
        all = fmaf((m.times.s[i] - m.times.s[j]) * dt, both, all);
    }
    store(to + row * kLdQ + 16 * quarter, kLdQ, M);
    store_rows(sums.row[quarter], row, rows[0], rows[1]);
    store_columns(sums.column[block] + 16 * quarter, columns);
    all = warp_sum(all);
    if (threadIdx.x % kWarp == 0) sums.pairs[threadIdx.x / kWarp] = all;
}

// sum += a b of a warp's 16 rows and N / 4 columns.
template <int N, class T>
__device__ inline void times_state(Sum (&sum)[N / 64], const T* a, const T* state, int row, int column) {
#pragma unroll
    for (int k = 0; k < kP; k += 16) {
        const Left<T> f = left<false>(a, kLdP, row, k);
#pragma unroll
        for (int b = 0; b < N / 64; ++b)
            multiply(sum[b], f, right<true>(state, N + kPad, k, column + 16 * b));
    }
}

// grad C += e_i S^T grad y_i and grad B += r_j Z^T X_j; the dot products of the first with C.
template <class T, int N>
__device__ void through_states(const PartTile<T, N>& m, const T* C, TokenSums& sums, Sum (&grad_B)[N / 64],
                               Sum (&grad_C)[N / 64]) {
    constexpr int kLdN = N + kPad;
    const int row = threadIdx.x / kWarp % 4 * 16, quarter = threadIdx.x / kWarp / 4,
              column = quarter * (N / 4);
    const int i[2] = {row + row_of(0), row + row_of(2)};
    const float decay[2] = {m.times.e[i[0]], m.times.e[i[1]]}, weight[2] = {m.times.w[i[0]], m.times.w[i[1]]};
    float dots[2] = {};
    Sum c[N / 64];
    times_state<N>(c, m.grad_y, m.S, row, column);
#pragma unroll
    for (int b = 0; b < N / 64; ++b) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int half = e / 2 % 2;
            const Pack<T, 2> own = load_pack<2>(C + i[half] * kLdN + column + 16 * b + column_of(e));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float v = decay[half] * c[b].v[e + k];
                grad_C[b].v[e + k] += v;
                dots[half] = fmaf(v, to_float(own.at[k]), dots[half]);
            }
        }
    }
    store_rows(sums.c[quarter], row, dots[0], dots[1]);
    Sum d[N / 64];
    times_state<N>(d, m.x, m.Z, row, column);
#pragma unroll
    for (int b = 0; b < N / 64; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) grad_B[b].v[e] += weight[e / 2 % 2] * d[b].v[e];
    }
}

// <Z, S> of the tile, a sum per warp.
template <class T, int N>
__device__ void states_product(const PartTile<T, N>& m, TokenSums& sums) {
    constexpr int kPack = 16 / sizeof(T), kPacks = N / kPack;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kP * kPacks / kThreads; ++k) {
        const int i = static_cast<int>(threadIdx.x) + k * kThreads,
                  at = i / kPacks * (N + kPad) + i % kPacks * kPack;
        const Pack<T, kPack> S = load_pack<kPack>(m.S + at), Z = load_pack<kPack>(m.Z + at);
#pragma unroll
        for (int e = 0; e < kPack; ++e) sum = fmaf(to_float(S.at[e]), to_float(Z.at[e]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) sums.inner[threadIdx.x / kWarp] = sum;
}

// The warp's block of r_j Z B_j, the state's part of grad X, and its dot products with x.
template <class T, int N>
__device__ void from_state(const PartTile<T, N>& m, const T* B, TokenSums& sums, Sum& grad_X) {
    const int row = threadIdx.x / kWarp % 4 * 16, quarter = threadIdx.x / kWarp / 4;
#pragma unroll
    for (int k = 0; k < N; k += 16)
        multiply(grad_X, left<false>(B, N + kPad, row, k), right<false>(m.Z, N + kPad, k, 16 * quarter));
    float dots[2] = {};
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const int i = row + row_of(e), j = 16 * quarter + column_of(e), half = e / 2 % 2;
        const Pack<T, 2> x = load_pack<2>(m.x + i * kLdP + j);
        const float r = m.times.r[i];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            grad_X.v[e + k] *= r;
            dots[half] = fmaf(grad_X.v[e + k], to_float(x.at[k]), dots[half]);
        }
    }
    store_rows(sums.xz[quarter], row, dots[0], dots[1]);
}

// grad X += M^T grad y.
template <class T, int N>
__device__ void from_pairs(const PartTile<T, N>& m, const T* M, Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4;
    for (int k = block; k < kQ / 16; ++k)
        multiply(grad_X, left<true>(M, kLdQ, 16 * block, 16 * k),
                 right<true>(m.grad_y, kLdP, 16 * k, 16 * quarter));
}

}  // namespace
}  // namespace ssm::cuda
