// Of ssd_backward on CUDA: the kernel Chunk, which has all that is local to a chunk of one group. Private;
// included once, by ssd_backward_cuda.cu.
#pragma once

#include "ssm/ops/ssd/ssd_backward_tile.cuh"

namespace ssm::cuda {
namespace {

// a and b to to[0] and to[1], the first `inside` of them. `paired`: one aligned word.
template <class T>
__device__ inline void give_two(T* to, float a, float b, int64_t inside, bool set, bool paired) {
    if (paired && inside >= 2) {
        if (!set) {
            const Pack<T, 2> old = load_pack<2>(to);
            a += to_float(old.at[0]);
            b += to_float(old.at[1]);
        }
        store_pack(to, Pack<T, 2>{{from_float<T>(a), from_float<T>(b)}});
        return;
    }
    if (inside >= 1) to[0] = from_float<T>(set ? a : to_float(to[0]) + a);
    if (inside >= 2) to[1] = from_float<T>(set ? b : to_float(to[1]) + b);
}

// grad x = dt grad X + D grad y, and the block's share of grad D.
template <class T, int N>
__device__ void write_inputs_gradient(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w,
                                      const Part& part, const Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, row = 16 * block, first = 16 * (threadIdx.x / kWarp / 4);
    T* const to = a.grad.x.data + w.begin * a.grad.x.stride + part.h * a.p + part.p0;
    float sum[4] = {};  // columns 0, 1, 8, 9 of a lane
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const int i = row + row_of(e), j = first + column_of(e);
        float v[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float g = to_float(m.grad_y[i * kLdP + j + k]);
            sum[k + e / 4 * 2] += g * to_float(m.x[i * kLdP + j + k]);
            v[k] = m.d.dt[i] * grad_X.v[e + k] + m.D_of[j + k] * g;
        }
        if (a.grad.x.data != nullptr && i < w.length)
            give_two(to + i * a.grad.x.stride + j, v[0], v[1], part.columns - j, a.grad.set.x, a.paired_x);
    }
    store_columns(m.D[block] + first, sum);
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

// By one warp: from the gradients of l to those of dt and A. Of l_j's, what token j gives as a row and takes
// as a column; suffix sums of them are those of dt A. grad A is summed apart, weighted by the times between
// the two ends of each term: most of the suffix sums would cancel in it.
template <class T, int N>
__device__ void finish(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w, const Part& part,
                       int64_t v) {
    const int lane = threadIdx.x, i = 2 * lane;
    const float time = m.d.s[kQ - 1];
    float own[2], xg[2], ends = 0.0f, grad_A = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int j = i + k;
        const float c = sum_of(m.c, j), xz = sum_of(m.xz, j), dt = m.d.dt[j];
        xg[k] = sum_of(m.column, j) + xz;
        own[k] = sum_of(m.row, j) + c - dt * xg[k];
        ends += dt * xz;
        grad_A += m.d.s[j] * c + (time - m.d.s[j]) * (dt * xz);
    }
    const bool warps = lane < kThreads / kWarp;
    const float through = __expf(m.d.l[kQ - 1]) * warp_sum(warps ? m.inner[lane] : 0.0f);
    ends = warp_sum(ends) + through;
    grad_A = warp_sum(grad_A + (warps ? m.pairs[lane] : 0.0f)) + time * through;
    // Suffix sums; the end's gradient reaches every token.
    double sum = static_cast<double>(own[0]) + own[1];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_down_sync(kAllLanes, sum, offset);
        if (lane + offset < kWarp) sum += other;
    }
    const float grad_a[2] = {static_cast<float>(sum + ends), static_cast<float>(sum - own[0] + ends)};
    const float A = a.in.A.data[part.h * a.in.A.stride];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        if (i + k < w.length) a.dt[v * a.tokens + w.begin + i + k] = (xg[k] + A * grad_a[k]) * m.slope[i + k];
    }
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
    const auto write = [&](const Sum(&sums)[N / 64], const View<T, 3>& grad, float* partial, bool set,
                           bool paired) {
        if (grad.data == nullptr) return;
#pragma unroll
        for (int b = 0; b < N / 64; ++b) {
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int64_t i = row + row_of(e), j = quarter * (N / 4) + 16 * b + column_of(e),
                              t = w.begin + i;
                if (i >= w.length) continue;
                const float x = sums[b].v[e], y = sums[b].v[e + 1];
                if (a.slices == 1) {
                    give_two(grad.data + t * grad.stride + w.group * a.n + j, x, y, a.n - j, set, paired);
                } else {
                    give_two(partial + ((w.slice * a.tokens + t) * a.groups + w.group) * a.n + j, x, y,
                             a.n - j, true, a.n % 2 == 0);
                }
            }
        }
    };
    write(grad_B, a.grad.B, a.B, a.grad.set.B, a.paired_B);
    write(grad_C, a.grad.C, a.C, a.grad.set.C, a.paired_C);
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
