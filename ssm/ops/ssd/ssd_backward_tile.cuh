// Of ssd_backward on CUDA: the parameters, the tiles of a chunk of one head, and the products with states of
// the kernel Chunk (ssd_backward_chunk.cuh) on them. Private; included once.
#pragma once

#include "ssm/ops/ssd/ssd_walk.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 512, kFetchThreads = 256;

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
    int n0 = 0, bands;  // the first of the columns of a state that Chunk is at; how many times it is launched
    const Times* times;  // [tiles heads]
    const T *S, *Z;      // [tiles, heads * ptiles, kP, N]: entering a tile; the gradient of what leaves it
    Partial* partial;    // [bands, tiles, heads * ptiles]
    float *A, *dt_bias, *D;  // [heads tiles]
    float *B, *C;            // [slices tokens groups n] if slices > 1
    bool packed_x, packed_B, packed_C, packed_grad_y;
    bool packed4_x, paired_B, paired_C;  // of the gradients: four or two neighbours lie in one aligned word
};

// ---- Chunk. 16 warps of three kinds, each of 16 tokens: 0 to 3 make grad C, 4 to 7 grad B, all columns of
// them; 8 to 15 grad x and grad G, with half of a head's elements. None needs what another makes of a head.
enum class Role { grad_C, grad_B, grad_x };
struct Own {
    Role role;
    int block, row, half;  // the block of 16 tokens, its first token; the half of a head's elements
};
// The later an input, the fewer pairs: the two warps of one tensor core have opposite ones.
__device__ inline Own own_of_warp() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, i = warp % 4, half = warp < 12 ? 0 : 1,
              block = half == 0 ? i : 3 - i;
    return {warp < 4 ? Role::grad_C : warp < 8 ? Role::grad_B : Role::grad_x, block, 16 * block, half};
}

template <class T, int N>
struct PartTile {
    T x[kQ * kLdP], grad_y[kQ * kLdP], S[kP * (N + kPad)], Z[kP * (N + kPad)];
    Times times;
    float D[kP];
};
struct TokenSums {
    float row[4][kQ], column[2][kQ], c[kQ], xz[2][kQ];  // row: by blocks of inputs, up to the token's own
    float D[4][kP], inner[4], pairs[8];
};
// bf16: a head's tile arrives while the one before is used; f32 has no room for two.
template <class T, int N>
struct ChunkTiles {
    static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
    PartTile<T, N> in[kStages];
    T B[kQ * (N + kPad)], C[kQ * (N + kPad)];
    TokenSums sums[2];
};

struct Where {
    int64_t tile, begin;
    int group, slice, first_part, last_part, length;
};
template <class T>
__device__ Where where_of_block(const BackwardParams<T>& a) {
    Where w{};
    w.tile = blockIdx.x;
    const Tile tile = tile_at(a.tiling, w.tile);
    w.begin = tile.begin;
    w.length = tile.length;
    const int slices = static_cast<int>(a.slices), parts = static_cast<int>(a.heads / a.groups * a.ptiles);
    w.group = static_cast<int>(blockIdx.y) / slices;
    w.slice = static_cast<int>(blockIdx.y) % slices;
    w.first_part = w.group * parts + parts * w.slice / slices;
    w.last_part = w.group * parts + parts * (w.slice + 1) / slices;
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

// By the warps of grad C and grad B, which have the least to compute.
template <class T, int N>
__device__ void fetch_part(PartTile<T, N>& m, const BackwardParams<T>& a, const Where& w, int64_t v) {
    const Part part = part_at(v, a.ptiles, a.p);
    const int64_t at = part.h * a.p + part.p0, state = (w.tile * a.heads * a.ptiles + v) * (kP * N);
    copy_tile<kQ, kP, kFetchThreads>(m.x, a.in.x.data + w.begin * a.in.x.stride + at, a.in.x.stride, w.length,
                                     part.columns, a.packed_x);
    copy_tile<kQ, kP, kFetchThreads>(m.grad_y, a.grad_y.data + w.begin * a.grad_y.stride + at,
                                     a.grad_y.stride, w.length, part.columns, a.packed_grad_y);
    copy_tile<kP, N, kFetchThreads>(m.S, a.S + state, N, kP, N, true);
    copy_tile<kP, N, kFetchThreads>(m.Z, a.Z + state, N, kP, N, true);
    copy_times(m.times, a.times[w.tile * a.heads + part.h]);
    copy_D(m.D, a.in.D, part, kFetchThreads - kP);
}

// What a warp of grad_x keeps of its inputs j for all heads: G_ij = C_i . B_j, transposed, of the four blocks
// of tokens i from its own on; of every second of them its gradient.
struct PairSums {
    Sum G[4], grad_G[2];
};

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

// 16 tokens of a head as left operands, 16 elements each, those of the half from `first` on before the
// others. bf16 keeps them in registers; f32 has no room and reads them again.
template <class T, bool kHeld = sizeof(T) == 2>
class Tokens {
public:
    __device__ Tokens(const T* m, int row, int first = 0) : m_(m), row_(row), first_(first) {
        if constexpr (kHeld) {
#pragma unroll
            for (int k = 0; k < kP / 16; ++k) held_[k] = left<false>(m_, kLdP, row_, column(k));
        }
    }
    __device__ int column(int k) const { return (k < 2 ? first_ : kP / 2 - first_) + 16 * (k % 2); }
    __device__ Left<T> operator[](int k) const {
        if constexpr (kHeld) {
            return held_[k];
        } else {
            return left<false>(m_, kLdP, row_, column(k));
        }
    }

private:
    const T* m_;
    int row_, first_;
    Left<T> held_[kHeld ? kP / 16 : 1];
};

// The product of 16 tokens and 16 of a state's N columns.
template <int N, class T>
__device__ inline Sum times_state(const Tokens<T>& tokens, const T* state, int column) {
    Sum s;
#pragma unroll
    for (int k = 0; k < kP / 16; ++k)
        multiply(s, tokens[k], right<true>(state, N + kPad, tokens.column(k), column));
    return s;
}

// grad C += e_i S^T grad y_i; its dot products with C.
template <class T, int N>
__device__ void add_grad_C(const PartTile<T, N>& m, const T* C, TokenSums& sums, int row,
                           Sum (&grad)[N / 16]) {
    const Tokens<T> grad_y(m.grad_y, row);
    const float decay[2] = {m.times.e[row + row_of(0)], m.times.e[row + row_of(2)]};
    float dots[2] = {};
#pragma unroll
    for (int b = 0; b < N / 16; ++b) {
        const Sum c = times_state<N>(grad_y, m.S, 16 * b);
        const Left<T> own = left<false>(C, N + kPad, row, 16 * b);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int k = e / 2 % 2;
            grad[b].v[e] = fmaf(decay[k], c.v[e], grad[b].v[e]);
            dots[k] = fmaf(c.v[e], element(own, e), dots[k]);
        }
    }
    store_rows(sums.c, row, decay[0] * dots[0], decay[1] * dots[1]);
}

// grad B += r_j Z^T X_j; and 16 rows of <Z, S>: the diagonal of Z S^T.
template <class T, int N>
__device__ void add_grad_B(const PartTile<T, N>& m, TokenSums& sums, int row, Sum (&grad)[N / 16]) {
    const Tokens<T> x(m.x, row);
    const float weight[2] = {m.times.w[row + row_of(0)], m.times.w[row + row_of(2)]};
    Sum products;
#pragma unroll
    for (int b = 0; b < N / 16; ++b) {
        const Sum d = times_state<N>(x, m.Z, 16 * b);
#pragma unroll
        for (int e = 0; e < 8; ++e) grad[b].v[e] = fmaf(weight[e / 2 % 2], d.v[e], grad[b].v[e]);
        multiply(products, left<false>(m.Z, N + kPad, row, 16 * b), right<false>(m.S, N + kPad, 16 * b, row));
    }
    float inner = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) inner += row_of(e) == column_of(e) ? products.v[e] : 0.0f;
    inner = warp_sum(inner);
    if (threadIdx.x % kWarp == 0) sums.inner[row / 16] = inner;
}

}  // namespace
}  // namespace ssm::cuda
