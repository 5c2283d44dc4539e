// Of ssd_backward on CUDA: the parameters, the tiles of a chunk of one head, and the products of the kernel
// Chunk (ssd_backward_chunk.cuh) on them. Private; included once.
#pragma once

#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 512, kQuarters = 4, kLdP = kP + kPad, kLdQ = kQ + kPad;

template <class T>
struct BackwardParams {
    SsdInputs<T> in;
    View<const float, 4> chunk_states, grad_final_state;
    View<const T, 3> grad_y;
    SsdGradients<T> grad;
    Sequences sequences, first;
    int64_t chunk, ptiles, heads, p, groups, n, tokens, chunks, slices;
    T* Z;          // [chunks heads p n], of the state leaving a chunk
    float* dt;     // [heads * ptiles, tokens]
    float *A, *D;  // [chunks, heads * ptiles] and the same x kP
    float *B, *C;  // [slices tokens groups n] if slices > 1
    bool packed_x, packed_B, packed_C, packed_grad_y, packed_state, packed_Z;
    bool paired_x, paired_B, paired_C;  // of the gradients: two neighbours lie in one aligned word
};

// One tile of a head: p0 .. p0 + columns of head h.
struct Part {
    int64_t h, p0;
    int columns;
};
template <class T>
__device__ Part part_of(const BackwardParams<T>& a, int64_t v) {
    const int64_t p0 = v % a.ptiles * kP;
    return {v / a.ptiles, p0, static_cast<int>(min(a.p - p0, static_cast<int64_t>(kP)))};
}
template <class T>
__device__ int64_t state_offset(const BackwardParams<T>& a, const Part& part) {
    return (part.h * a.p + part.p0) * a.n;
}

// ---- Chunk. Warp w has the tokens 16 (w % 4) .. and one quarter, w / 4, of the columns of each product.
template <class T, int N>
struct ChunkTiles {
    T x[kQ * kLdP], grad_y[kQ * kLdP], M[kQ * kLdQ];
    T B[kQ * (N + kPad)], C[kQ * (N + kPad)], S[kP * (N + kPad)], Z[kP * (N + kPad)];
    Decays d;
    float e[kQ], r[kQ];         // exp(l), exp(l_q - l)
    float slope[kQ], D_of[kP];  // d dt / d raw dt; D
    float row[kQuarters][kQ], column[4][kQ], c[kQuarters][kQ],
        xz[kQuarters][kQ];  // parts of sums of a token, see finish()
    float D[4][kP], inner[kThreads / kWarp], pairs[kThreads / kWarp];  // partial sums: grad D, <Z, S>, grad A
};

struct Where {
    int64_t begin, chunk, group, first_part, last_part, slice;
    int length;
};
template <class T>
__device__ Where where_of_block(const BackwardParams<T>& a) {
    Where w{};
    w.chunk = blockIdx.x;
    int64_t low = 0, high = a.sequences.count;  // the last sequence that begins at or before the chunk
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (a.first.offset(middle) <= w.chunk ? low : high) = middle;
    }
    w.begin = a.sequences.offset(low) + (w.chunk - a.first.offset(low)) * a.chunk;
    w.length = static_cast<int>(min(a.sequences.offset(low + 1) - w.begin, a.chunk));
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
__device__ void load_part(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w, const Part& part) {
    const int n = static_cast<int>(a.n);
    load_tile<kQ, kP, kThreads>(m.x, a.in.x.data + w.begin * a.in.x.stride + part.h * a.p + part.p0,
                                a.in.x.stride, w.length, part.columns, a.packed_x);
    load_tile<kQ, kP, kThreads>(m.grad_y, a.grad_y.data + w.begin * a.grad_y.stride + part.h * a.p + part.p0,
                                a.grad_y.stride, w.length, part.columns, a.packed_grad_y);
    const int64_t offset = state_offset(a, part);
    load_tile<kP, N, kThreads>(m.S, a.chunk_states.data + w.chunk * a.chunk_states.stride + offset, n,
                               part.columns, n, a.packed_state);
    load_tile<kP, N, kThreads>(m.Z, a.Z + w.chunk * a.heads * a.p * a.n + offset, n, part.columns, n,
                               a.packed_Z);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= 128 && thread < 128 + kP) load_D(m.D_of, a.in.D, part.h, part.p0, part.columns);
    if (thread >= 64 && thread < 128) {
        const int i = thread - 64;
        const float raw = i < w.length ? raw_dt(a.in, w.begin + i, part.h) : 0.0f, soft = exact_softplus(raw);
        const bool inside = soft >= a.in.dt_min && soft <= a.in.dt_max;
        m.slope[i] = !a.in.dt_softplus ? 1.0f : inside ? 1.0f / (1.0f + expf(-raw)) : 0.0f;
    }
    if (thread < kWarp) {
        make_decays(m.d, a.in, w.begin, w.length, part.h);
        __syncwarp();
        for (int j = threadIdx.x; j < kQ; j += kWarp) {
            m.e[j] = __expf(m.d.l[j]);
            m.r[j] = __expf(m.d.l[kQ - 1] - m.d.l[j]);
        }
    }
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
__device__ void pairs(ChunkTiles<T, N>& m, const Sum& G, Sum& grad_G) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
    Sum grad_M, M;
#pragma unroll
    for (int k = 0; k < kP; k += 16) {
        const Left<T> g = left<false>(m.grad_y, kLdP, row, k);
        if (quarter <= block) multiply(grad_M, g, right<false>(m.x, kLdP, k, 16 * quarter));
    }
    float rows[2] = {}, columns[4] = {}, all = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int i = row + row_of(e), j = 16 * quarter + column_of(e);
        if (j > i) continue;
        const float decay = __expf(m.d.l[i] - m.d.l[j]), dt = m.d.dt[j];
        M.v[e] = decay * G.v[e];
        grad_G.v[e] += decay * (dt * grad_M.v[e]);
        const float both = grad_M.v[e] * M.v[e];
        columns[e % 2 + e / 4 * 2] += both;
        rows[e / 2 % 2] = fmaf(dt, both, rows[e / 2 % 2]);
        all = fmaf((m.d.s[i] - m.d.s[j]) * dt, both, all);
    }
    store(m.M + row * kLdQ + 16 * quarter, kLdQ, M);
    store_rows(m.row[quarter], row, rows[0], rows[1]);
    store_columns(m.column[block] + 16 * quarter, columns);
    all = warp_sum(all);
    if (threadIdx.x % kWarp == 0) m.pairs[threadIdx.x / kWarp] = all;
}

// grad C += e_i S^T grad y_i and grad B += r_j Z^T X_j; the dot products of the first with C.
template <class T, int N>
__device__ void through_states(ChunkTiles<T, N>& m, Sum (&grad_B)[N / 64], Sum (&grad_C)[N / 64]) {
    constexpr int kLdN = N + kPad;
    const int row = threadIdx.x / kWarp % 4 * 16, quarter = threadIdx.x / kWarp / 4;
    const int i[2] = {row + row_of(0), row + row_of(2)};
    const float decay[2] = {m.e[i[0]], m.e[i[1]]};
    const float weight[2] = {m.r[i[0]] * m.d.dt[i[0]], m.r[i[1]] * m.d.dt[i[1]]};
    float sums[2] = {};
#pragma unroll
    for (int b = 0; b < N / 64; ++b) {
        const int column = quarter * (N / 4) + 16 * b;
        Sum c, d;
#pragma unroll
        for (int k = 0; k < kP; k += 16)
            multiply(c, left<false>(m.grad_y, kLdP, row, k), right<true>(m.S, kLdN, k, column));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float v = decay[e / 2 % 2] * c.v[e];
            grad_C[b].v[e] += v;
            sums[e / 2 % 2] += v * to_float(m.C[i[e / 2 % 2] * kLdN + column + column_of(e)]);
        }
#pragma unroll
        for (int k = 0; k < kP; k += 16)
            multiply(d, left<false>(m.x, kLdP, row, k), right<true>(m.Z, kLdN, k, column));
#pragma unroll
        for (int e = 0; e < 8; ++e) grad_B[b].v[e] += weight[e / 2 % 2] * d.v[e];
    }
    store_rows(m.c[quarter], row, sums[0], sums[1]);
}

// The warp's block of grad X = M^T grad y + r_j Z B_j, and x . of the last term.
template <class T, int N>
__device__ void inputs_gradient(ChunkTiles<T, N>& m, Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const Left<T> B = left<false>(m.B, N + kPad, row, k);
        multiply(grad_X, B, right<false>(m.Z, N + kPad, k, 16 * quarter));
    }
    float last[2] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        grad_X.v[e] *= m.r[row + row_of(e)];
        last[e / 2 % 2] +=
            grad_X.v[e] * to_float(m.x[(row + row_of(e)) * kLdP + 16 * quarter + column_of(e)]);
    }
    for (int k = block; k < kQ / 16; ++k) {
        const Left<T> M = left<true>(m.M, kLdQ, row, 16 * k);
        multiply(grad_X, M, right<true>(m.grad_y, kLdP, 16 * k, 16 * quarter));
    }
    store_rows(m.xz[quarter], row, last[0], last[1]);
}

}  // namespace
}  // namespace ssm::cuda
