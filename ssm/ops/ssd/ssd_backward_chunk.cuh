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
__device__ void write_inputs_gradient(const PartTile<T, N>& m, TokenSums& sums, const BackwardParams<T>& a,
                                      const Where& w, const Part& part, Sum& grad_X) {
    const int block = threadIdx.x / kWarp % 4, row = 16 * block, first = 16 * (threadIdx.x / kWarp / 4);
    float sum[4] = {};  // columns 0, 1, 8, 9 of a lane
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const int i = row + row_of(e), j = first + column_of(e);
        const Pack<T, 2> grad_y = load_pack<2>(m.grad_y + i * kLdP + j), x = load_pack<2>(m.x + i * kLdP + j);
        const float dt = m.times.dt[i];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float g = to_float(grad_y.at[k]);
            sum[k + e / 4 * 2] += g * to_float(x.at[k]);
            grad_X.v[e + k] = dt * grad_X.v[e + k] + m.D[j + k] * g;
        }
    }
    store_columns(sums.D[block] + first, sum);
    if (a.grad.x.data == nullptr) return;
    const int j = first + column_of_four(), i = row + row_of(0);
    const Four above = four_of<false>(grad_X), below = four_of<true>(grad_X);
    T* const to = a.grad.x.data + (w.begin + i) * a.grad.x.stride + part.h * a.p + part.p0 + j;
    if (i < w.length) give_four(to, above, part.columns - j, a.grad.set.x, a.packed4_x);
    if (i + 8 < w.length)
        give_four(to + 8 * a.grad.x.stride, below, part.columns - j, a.grad.set.x, a.packed4_x);
}

__device__ inline float sum_of(const float (&parts)[4][kQ], int j) {
    return (parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j]);
}

// The sums of a part that is done.
__device__ inline void leave_sums(Partial& to, const TokenSums& sums) {
    const int thread = static_cast<int>(threadIdx.x), j = thread % kQ;
    if (thread < kQ) {
        to.token[j] = {{sum_of(sums.row, j), sum_of(sums.column, j), sum_of(sums.c, j), sum_of(sums.xz, j)}};
    } else if (thread < 2 * kQ) {
        to.D[j] = sum_of(sums.D, j);
    } else if (thread < 2 * kQ + kWarp) {
        const bool given = j < kThreads / kWarp;
        const float inner = warp_sum(given ? sums.inner[j] : 0.0f),
                    pairs = warp_sum(given ? sums.pairs[j] : 0.0f);
        if (j == 0) {
            to.inner = inner;
            to.pairs = pairs;
        }
    }
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
    constexpr bool kAhead = ChunkTiles<T, N>::kStages == 2;
    const Where w = where_of_block(a);
    const int n = static_cast<int>(a.n), block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4;
    copy_tile<kQ, N, kThreads>(m.B, a.in.B.data + w.begin * a.in.B.stride + w.group * n, a.in.B.stride,
                               w.length, n, a.packed_B);
    copy_tile<kQ, N, kThreads>(m.C, a.in.C.data + w.begin * a.in.C.stride + w.group * n, a.in.C.stride,
                               w.length, n, a.packed_C);
    fetch_part(m.in[0], a, w, w.first_part);
    wait_copies();
    __syncthreads();
    Sum G, grad_G, grad_B[N / 64], grad_C[N / 64];
#pragma unroll
    for (int k = 0; k < N; k += 16)
        multiply(G, left<false>(m.C, N + kPad, 16 * block, k), right<false>(m.B, N + kPad, k, 16 * quarter));
    Partial* const partial = a.partial + w.tile * a.heads * a.ptiles;
    int now = 0;
    for (int64_t v = w.first_part; v < w.last_part; ++v, now = 1 - now) {
        const PartTile<T, N>& in = m.in[kAhead ? now : 0];
        TokenSums& sums = m.sums[now];
        if (!kAhead && v > w.first_part) {
            __syncthreads();  // the tile of the head before is read
            fetch_part(m.in[0], a, w, v);
        }
        wait_copies();
        __syncthreads();  // this tile is there; the other one, M and sums[now] are read
        if (kAhead && v + 1 < w.last_part) fetch_part(m.in[1 - now], a, w, v + 1);
        if (v > w.first_part) leave_sums(partial[v - 1], m.sums[1 - now]);
        pairs(in, m.M, sums, G, grad_G);
        through_states(in, m.C, sums, grad_B, grad_C);
        states_product(in, sums);
        Sum grad_X;
        from_state(in, m.B, sums, grad_X);
        __syncthreads();  // M
        from_pairs(in, m.M, grad_X);
        write_inputs_gradient(in, sums, a, w, part_at(v, a.ptiles, a.p), grad_X);
    }
    __syncthreads();
    leave_sums(partial[w.last_part - 1], m.sums[1 - now]);
    finish_group<T, N>(m, a, w, grad_G, grad_B, grad_C);
}

}  // namespace
}  // namespace ssm::cuda
