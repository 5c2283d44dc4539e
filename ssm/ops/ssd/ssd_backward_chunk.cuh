// Of ssd_backward on CUDA: the parameters, and the kernel Chunk, which has all that is local to a chunk of
// one group. Private; included once, by ssd_backward_cuda.cu.
#pragma once

#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 512, kQuarters = 4, kLdP = kP + kPad, kLdQ = kQ + kPad;

template <class T>
struct BackwardParams {
    SsdInputs<T> in;
    View<const float, 4> chunk_states, grad_final_state;
    View<const float, 3> grad_y;
    SsdGradients grad;
    Sequences sequences, first;
    int64_t chunk, ptiles, heads, p, groups, n, tokens, chunks, slices;
    T* Z;          // [chunks heads p n], of the state leaving a chunk
    float* dt;     // [heads * ptiles, tokens]
    float *A, *D;  // [chunks, heads * ptiles] and the same x kP
    float *B, *C;  // [slices tokens groups n] if slices > 1
    bool packed_x, packed_B, packed_C, packed_grad_y, packed_state, packed_Z;
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
    float row[kQuarters][kQ], c[kQuarters][kQ], xg[kQuarters][kQ],
        xz[kQuarters][kQ];                    // parts of dot products of a token, see finish()
    float D[4][kP], inner[kThreads / kWarp];  // partial sums of grad D; of <Z, S>
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

// grad M on the triangle: its share of grad G, its rows' sums with M, and M itself to memory. The sums take M
// as rounded: finish() subtracts the columns' sums, which come through memory, and most of both cancels.
template <class T, int N>
__device__ void pairs(ChunkTiles<T, N>& m, const Sum& G, Sum& grad_G) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
    Sum grad_M;
#pragma unroll
    for (int k = 0; k < kP; k += 16) {
        const Left<T> g = left<false>(m.grad_y, kLdP, row, k);

        if (quarter <= block) multiply(grad_M, g, right<false>(m.x, kLdP, k, 16 * quarter));
    }
    float sums[2] = {};

    {
        Sum M;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = row + row_of(e), j = 16 * quarter + column_of(e);
            if (j > i) continue;
            const float decay = __expf(m.d.l[i] - m.d.l[j]), g = m.d.dt[j] * grad_M.v[e];
            M.v[e] = to_float(from_float<T>(decay * G.v[e]));
            grad_G.v[e] += decay * g;
            sums[e / 2 % 2] += g * M.v[e];
        }
        store(m.M + row * kLdQ + 16 * quarter, kLdQ, M);
    }
    store_rows(m.row[quarter], row, sums[0], sums[1]);
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

// The warp's block of grad X = M^T grad y + r_j Z B_j, and x . of the whole and of the last term.
template <class T, int N>
__device__ void inputs_gradient(ChunkTiles<T, N>& m, Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const Left<T> B = left<false>(m.B, N + kPad, row, k);

        multiply(grad_X, B, right<false>(m.Z, N + kPad, k, 16 * quarter));
    }
    float all[2] = {}, last[2] = {};
    const auto x = [&](int e) {
        return to_float(m.x[(row + row_of(e)) * kLdP + 16 * quarter + column_of(e)]);
    };

    {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            grad_X.v[e] *= m.r[row + row_of(e)];
            last[e / 2 % 2] += grad_X.v[e] * x(e);
        }
    }
    for (int k = block; k < kQ / 16; ++k) {
        const Left<T> M = left<true>(m.M, kLdQ, row, 16 * k);

        multiply(grad_X, M, right<true>(m.grad_y, kLdP, 16 * k, 16 * quarter));
    }

    {
#pragma unroll
        for (int e = 0; e < 8; ++e) all[e / 2 % 2] += grad_X.v[e] * x(e);
    }
    store_rows(m.xg[quarter], row, all[0], all[1]);
    store_rows(m.xz[quarter], row, last[0], last[1]);
}

// grad x = dt grad X + D grad y, and the block's share of grad D.
template <class T, int N>
__device__ void write_inputs_gradient(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w,
                                      const Part& part, const Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, row = 16 * block, first = 16 * (threadIdx.x / kWarp / 4);
    float* const to = a.grad.x.data + w.begin * a.grad.x.stride + part.h * a.p + part.p0;
    const auto inside = [&](int e) {
        return a.grad.x.data != nullptr && row + row_of(e) < w.length && first + column_of(e) < part.columns;
    };
    float sum[4] = {};  // columns 0, 1, 8, 9 of a lane
    Sum before;         // all loads before the first store
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (inside(e)) before.v[e] = to[(row + row_of(e)) * a.grad.x.stride + first + column_of(e)];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int i = row + row_of(e), j = first + column_of(e);
        const float g = to_float(m.grad_y[i * kLdP + j]);
        sum[e % 2 + e / 4 * 2] += g * to_float(m.x[i * kLdP + j]);
        before.v[e] += m.d.dt[i] * grad_X.v[e] + m.D_of[j] * g;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (inside(e)) to[(row + row_of(e)) * a.grad.x.stride + first + column_of(e)] = before.v[e];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2)
            sum[k] += __shfl_xor_sync(kAllLanes, sum[k], offset);
        if (threadIdx.x % kWarp < 4) m.D[block][first + column_of(k % 2 + k / 2 * 4)] = sum[k];
    }
}

// <Z, S> of the tile, a sum per warp.
template <class T, int N>
__device__ void states_product(ChunkTiles<T, N>& m) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < kP * N; i += kThreads) {
        const int at = i / N * (N + kPad) + i % N;
        sum += to_float(m.S[at]) * to_float(m.Z[at]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) m.inner[threadIdx.x / kWarp] = sum;
}

__device__ inline float sum_of(const float (&parts)[kQuarters][kQ], int j) {
    return (parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j]);
}

// By one warp: from the gradients of l to those of dt and A.
template <class T, int N>
__device__ void finish(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w, const Part& part,
                       int64_t v) {
    const int lane = threadIdx.x, i = 2 * lane;
    float own[2], xg[2], ends = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int j = i + k;
        xg[k] = sum_of(m.xg, j);
        own[k] = sum_of(m.row, j) + sum_of(m.c, j) - m.d.dt[j] * xg[k];
        ends += m.d.dt[j] * sum_of(m.xz, j);
    }
    ends = warp_sum(ends) + __expf(m.d.l[kQ - 1]) * warp_sum(lane < kThreads / kWarp ? m.inner[lane] : 0.0f);
    // Suffix sums; the end's gradient reaches every token.
    double sum = static_cast<double>(own[0]) + own[1];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_down_sync(kAllLanes, sum, offset);
        if (lane + offset < kWarp) sum += other;
    }
    const float grad_a[2] = {static_cast<float>(sum + ends), static_cast<float>(sum - own[0] + ends)};
    const float A = a.in.A.data[part.h * a.in.A.stride];
    float grad_A = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        if (i + k >= w.length) continue;
        a.dt[v * a.tokens + w.begin + i + k] = (xg[k] + A * grad_a[k]) * m.slope[i + k];
        grad_A += m.d.dt[i + k] * grad_a[k];
    }
    grad_A = warp_sum(grad_A);
    if (lane == 0) a.A[w.chunk * a.heads * a.ptiles + v] = grad_A;
}

// The pairs' share of grad B and grad C, and both to memory.
template <class T, int N>
__device__ void finish_group(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w,
                             const Sum& grad_G, Sum (&grad_B)[N / 64], Sum (&grad_C)[N / 64]) {
    constexpr int kLdN = N + kPad;
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
    __syncthreads();

    store(m.M + row * kLdQ + 16 * quarter, kLdQ, grad_G);
    __syncthreads();
    for (int k = 0; k < kQ / 16; ++k) {
        const Left<T> by_row = left<false>(m.M, kLdQ, row, 16 * k),
                      by_column = left<true>(m.M, kLdQ, row, 16 * k);
#pragma unroll
        for (int b = 0; b < N / 64; ++b) {
            const int column = quarter * (N / 4) + 16 * b;
            if (k <= block) multiply(grad_C[b], by_row, right<true>(m.B, kLdN, 16 * k, column));
            if (k >= block) multiply(grad_B[b], by_column, right<true>(m.C, kLdN, 16 * k, column));
        }
    }
    const auto write = [&](const Sum(&sums)[N / 64], const View<float, 3>& grad, float* partial) {
        if (grad.data == nullptr) return;
#pragma unroll
        for (int b = 0; b < N / 64; ++b) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int64_t i = row + row_of(e), j = quarter * (N / 4) + 16 * b + column_of(e),
                              t = w.begin + i;
                if (i >= w.length || j >= a.n) continue;
                if (a.slices == 1) {
                    grad.data[t * grad.stride + w.group * a.n + j] += sums[b].v[e];
                } else {
                    partial[((w.slice * a.tokens + t) * a.groups + w.group) * a.n + j] = sums[b].v[e];
                }
            }
        }
    };
    write(grad_B, a.grad.B, a.B);
    write(grad_C, a.grad.C, a.C);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1) Chunk(const __grid_constant__ BackwardParams<T> a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<ChunkTiles<T, N>*>(memory);
    const Where w = where_of_block(a);
    const int n = static_cast<int>(a.n), block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4;
    load_tile<kQ, N, kThreads>(m.B, a.in.B.data + w.begin * a.in.B.stride + w.group * n, a.in.B.stride,
                               w.length, n, a.packed_B);
    load_tile<kQ, N, kThreads>(m.C, a.in.C.data + w.begin * a.in.C.stride + w.group * n, a.in.C.stride,
                               w.length, n, a.packed_C);
    __syncthreads();
    Sum G, grad_G, grad_B[N / 64], grad_C[N / 64];
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const Left<T> C = left<false>(m.C, N + kPad, 16 * block, k);

        multiply(G, C, right<false>(m.B, N + kPad, k, 16 * quarter));
    }
    for (int64_t v = w.first_part; v < w.last_part; ++v) {
        const Part part = part_of(a, v);
        __syncthreads();
        load_part(m, a, w, part);
        __syncthreads();
        pairs<T, N>(m, G, grad_G);
        through_states<T, N>(m, grad_B, grad_C);
        states_product<T, N>(m);
        __syncthreads();
        Sum grad_X;
        inputs_gradient<T, N>(m, grad_X);
        write_inputs_gradient<T, N>(m, a, w, part, grad_X);
        __syncthreads();
        if (threadIdx.x < kWarp) finish<T, N>(m, a, w, part, v);
        if (threadIdx.x >= kThreads - kP) {
            const int j = static_cast<int>(threadIdx.x) - (kThreads - kP);
            a.D[(w.chunk * a.heads * a.ptiles + v) * kP + j] =
                (m.D[0][j] + m.D[1][j]) + (m.D[2][j] + m.D[3][j]);
        }
    }
    finish_group<T, N>(m, a, w, grad_G, grad_B, grad_C);
}

}  // namespace
}  // namespace ssm::cuda
