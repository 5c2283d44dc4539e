// Of ssd_backward on CUDA: the kernel Chunk, which has all that is local to a chunk of one group. Private;
// included once, by ssd_backward_cuda.cu.
#pragma once

#include "ssm/ops/ssd/ssd_backward_tile.cuh"

namespace ssm::cuda {
namespace {

// a and b to to[0] and to[1], the first `inside` of them. `paired`: one aligned word.
template <class T>
__device__ inline void give_two(T* to, float a, float b, int inside, bool set, bool paired) {
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

// r_j Z B_j, the state's part of grad X, and its dot products with x.
template <class T, int N>
__device__ void from_state(const PartTile<T, N>& m, const T* B, TokenSums& sums, const Own& own,
                           const Tokens<T, false>& x, Sum (&grad_X)[2]) {
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const Left<T> f = left<false>(B, N + kPad, own.row, k);
#pragma unroll
        for (int c = 0; c < 2; ++c) multiply(grad_X[c], f, right<false>(m.Z, N + kPad, k, x.column(c)));
    }
    const float r[2] = {m.times.r[own.row + row_of(0)], m.times.r[own.row + row_of(2)]};
    float dots[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Left<T> f = x[c];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int k = e / 2 % 2;
            grad_X[c].v[e] *= r[k];
            dots[k] = fmaf(grad_X[c].v[e], element(f, e), dots[k]);
        }
    }
    store_rows(sums.xz[own.half], own.row, dots[0], dots[1]);
}

// grad X += M^T grad y. Of every second block: of grad M o M, all in f32, the sums by outputs i and by inputs
// j, and that of all weighted by the time between the two tokens, which is their share of grad A; grad G.
template <class T, int N>
__device__ void from_pairs(const PartTile<T, N>& m, TokenSums& sums, const Own& own,
                           const Tokens<T, false>& x, PairSums& pairs, Sum (&grad_X)[2]) {
    const int j[2] = {own.row + row_of(0), own.row + row_of(2)};
    const float l[2] = {m.times.l[j[0]], m.times.l[j[1]]}, s[2] = {m.times.s[j[0]], m.times.s[j[1]]},
                dt[2] = {m.times.dt[j[0]], m.times.dt[j[1]]};
    float inputs[2] = {}, all = 0.0f;
#pragma unroll
    for (int d = 0; d < kQ / 16; ++d) {
        if (own.block + d >= kQ / 16) break;
        const int i0 = own.row + 16 * d;
        Sum decay, M;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float value = decay_of(m.times.l[i0 + column_of(e)] - l[e / 2 % 2]);
            decay.v[e] = d > 0 || column_of(e) >= row_of(e) ? value : 0.0f;
            M.v[e] = decay.v[e] * pairs.G[d].v[e];
        }
        if (d % 2 == own.half) {
            Sum grad_M;
#pragma unroll
            for (int k = 0; k < kP / 16; ++k)
                multiply(grad_M, x[k], right<false>(m.grad_y, kLdP, x.column(k), i0));
            Sum& grad_G = pairs.grad_G[d / 2];
            float outputs[4] = {};
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int k = e / 2 % 2;
                const float both = grad_M.v[e] * M.v[e], weighted = dt[k] * both;
                grad_G.v[e] = fmaf(decay.v[e] * dt[k], grad_M.v[e], grad_G.v[e]);
                inputs[k] += both;
                outputs[e % 2 + e / 4 * 2] += weighted;
                all = fmaf(m.times.s[i0 + column_of(e)] - s[k], weighted, all);
            }
            store_columns(sums.row[own.block] + i0, outputs);
        }
        const Left<T> f = as_left<T>(M);
#pragma unroll
        for (int c = 0; c < 2; ++c) multiply(grad_X[c], f, right<true>(m.grad_y, kLdP, i0, x.column(c)));
    }
    store_rows(sums.column[own.half], own.row, inputs[0], inputs[1]);
    all = warp_sum(all);
    if (threadIdx.x % kWarp == 0) sums.pairs[4 * own.half + own.block] = all;
}

// grad x = dt grad X + D grad y, and the block's share of grad D.
template <class T, int N>
__device__ void write_grad_x(const PartTile<T, N>& m, TokenSums& sums, const Own& own,
                             const BackwardParams<T>& a, const Where& w, const Part& part,
                             const Tokens<T, false>& x, Sum (&grad_X)[2]) {
    const int i = own.row + row_of(0);
    const float dt[2] = {m.times.dt[i], m.times.dt[i + 8]};
    T* const to = a.grad.x.data + (w.begin + i) * a.grad.x.stride + part.h * a.p + part.p0;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Left<T> own_x = x[c], grad_y = left<false>(m.grad_y, kLdP, own.row, x.column(c));
        float sum[4] = {};  // columns 0, 1, 8, 9 of a lane
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float g = element(grad_y, e), D = m.D[x.column(c) + column_of(e)];
            sum[e % 2 + e / 4 * 2] += g * element(own_x, e);
            grad_X[c].v[e] = dt[e / 2 % 2] * grad_X[c].v[e] + D * g;
        }
        store_columns(sums.D[own.block] + x.column(c), sum);
        if (a.grad.x.data == nullptr) continue;
        const int j = x.column(c) + column_of_four();
        const Four above = four_of<false>(grad_X[c]), below = four_of<true>(grad_X[c]);
        if (i < w.length) give_four(to + j, above, part.columns - j, a.grad.set.x, a.packed4_x);
        if (i + 8 < w.length)
            give_four(to + 8 * a.grad.x.stride + j, below, part.columns - j, a.grad.set.x, a.packed4_x);
    }
}

// The sums of a part that is done; by the warps of grad B.
__device__ inline void leave_sums(Partial& to, const TokenSums& sums) {
    const int thread = static_cast<int>(threadIdx.x) - 4 * kWarp, j = thread % kQ;
    if (thread < 0 || thread >= 2 * kQ) return;
    if (thread < kQ) {
        float row = sums.row[0][j];
#pragma unroll
        for (int b = 1; b < 4; ++b) row += 16 * b <= j ? sums.row[b][j] : 0.0f;
        to.token[j] = {
            {row, sums.column[0][j] + sums.column[1][j], sums.c[j], sums.xz[0][j] + sums.xz[1][j]}};
    } else {
        to.D[j] = (sums.D[0][j] + sums.D[1][j]) + (sums.D[2][j] + sums.D[3][j]);
        if (j == 0) to.inner = (sums.inner[0] + sums.inner[1]) + (sums.inner[2] + sums.inner[3]);
        if (j == kWarp) {
            float pairs = 0.0f;
#pragma unroll
            for (const float x : sums.pairs) pairs += x;
            to.pairs = pairs;
        }
    }
}

// A warp's 16 rows of grad B or grad C, to memory or to the slice's partial sums.
template <class T, int K>
__device__ void write_sums(const Sum (&sums)[K], const View<T, 3>& grad, float* partial, bool set,
                           bool paired, const BackwardParams<T>& a, const Where& w, int row) {
    if (grad.data == nullptr) return;
    const int inside = static_cast<int>(a.n) - a.n0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = row + row_of(2 * half);
        if (i >= w.length) continue;
        const int64_t t = w.begin + i;
        T* const to = grad.data + t * grad.stride + w.group * a.n + a.n0;
        float* const share = partial + ((w.slice * a.tokens + t) * a.groups + w.group) * a.n + a.n0;
#pragma unroll
        for (int k = 0; k < 2 * K; ++k) {
            const int e = 2 * half + k % 2 * 4, j = k / 2 * 16 + column_of(e);
            const float x = sums[k / 2].v[e], y = sums[k / 2].v[e + 1];
            if (a.slices == 1) {
                give_two(to + j, x, y, inside - j, set, paired);
            } else {
                give_two(share + j, x, y, inside - j, true, a.n % 2 == 0);
            }
        }
    }
}

// sums += a times 16 rows of B or C from row k on.
template <class T, int K>
__device__ inline void add_block(Sum (&sums)[K], const Left<T>& a, const T* m, int k) {
#pragma unroll
    for (int b = 0; b < K; ++b) multiply(sums[b], a, right<true>(m, 16 * K + kPad, k, 16 * b));
}

template <class T, int N>
__device__ inline void multiply_pairs(PairSums& pairs, const T* B, const T* C, const Own& own) {
#pragma unroll
    for (int d = 0; d < kQ / 16; ++d) {
        if (own.block + d >= kQ / 16) break;
#pragma unroll
        for (int k = 0; k < N; k += 16)
            multiply(pairs.G[d], left<false>(B, N + kPad, own.row, k),
                     right<false>(C, N + kPad, k, own.row + 16 * d));
    }
}
template <class T>
__device__ inline void store_grad_G(T* to, const PairSums& pairs, const Own& own) {
#pragma unroll
    for (int d = 0; d < kQ / 16; ++d) {
        if (own.block + d < kQ / 16 && d % 2 == own.half)
            store(to + own.row * kLdQ + own.row + 16 * d, kLdQ, pairs.grad_G[d / 2]);
    }
}

// All warps of the block, wherever they are.
__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// f(part's tile, its sums, part) for the parts of a group, by the warps of one role; each while the next
// one's tile arrives.
template <Role kRole, class T, int N, class F>
__device__ inline void each_part(ChunkTiles<T, N>& m, const BackwardParams<T>& a, const Where& w,
                                 const F& f) {
    constexpr bool kAhead = ChunkTiles<T, N>::kStages == 2, kFetches = kRole != Role::grad_x;
    Partial* const partial = a.partial + (a.n0 / N * a.tiles + w.tile) * a.heads * a.ptiles;
    int now = 0;
    for (int v = w.first_part; v < w.last_part; ++v, now = 1 - now) {
        if (!kAhead && v > w.first_part) {
            meet();  // the tile of the head before is read
            if (kFetches) fetch_part(m.in[0], a, w, v);
        }
        if (kFetches) wait_copies();
        meet();  // this tile is there; the other one and sums[now] are read
        if (kFetches && kAhead && v + 1 < w.last_part) fetch_part(m.in[1 - now], a, w, v + 1);
        if (kRole == Role::grad_B && v > w.first_part) leave_sums(partial[v - 1], m.sums[1 - now]);
        f(m.in[kAhead ? now : 0], m.sums[now], v);
    }
    meet();
    if (kRole == Role::grad_B) leave_sums(partial[w.last_part - 1], m.sums[1 - now]);
}

// The columns from a.n0 on; of the first ones, launched first, the pairs too: G is the sum over all.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1) Chunk(const __grid_constant__ BackwardParams<T> a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<ChunkTiles<T, N>*>(memory);
    const Where w = where_of_block(a);
    const Own own = own_of_warp();
    const int n = static_cast<int>(a.n);
    PairSums pairs;
    if (own.role != Role::grad_x) fetch_part(m.in[0], a, w, w.first_part);
    for (int n0 = a.n0 == 0 ? (a.bands - 1) * N : a.n0;; n0 -= N) {
        const int64_t at = w.group * n + n0;
        copy_tile<kQ, N, kThreads>(m.B, a.in.B.data + w.begin * a.in.B.stride + at, a.in.B.stride, w.length,
                                   n - n0, a.packed_B);
        copy_tile<kQ, N, kThreads>(m.C, a.in.C.data + w.begin * a.in.C.stride + at, a.in.C.stride, w.length,
                                   n - n0, a.packed_C);
        wait_copies();
        __syncthreads();
        if (own.role == Role::grad_x && a.n0 == 0) multiply_pairs<T, N>(pairs, m.B, m.C, own);
        if (n0 == a.n0) break;
        __syncthreads();
    }
    T* const grad_G = m.in[0].x;  // transposed, after the last part
    if (own.role == Role::grad_C) {
        Sum grad_C[N / 16];
        each_part<Role::grad_C>(m, a, w, [&](const PartTile<T, N>& in, TokenSums& sums, int) {
            add_grad_C(in, m.C, sums, own.row, grad_C);
        });
        meet();
        for (int k = 0; k <= own.block; ++k)
            add_block(grad_C, left<true>(grad_G, kLdQ, own.row, 16 * k), m.B, 16 * k);
        write_sums(grad_C, a.grad.C, a.C, a.grad.set.C, a.paired_C, a, w, own.row);
    } else if (own.role == Role::grad_B) {
        Sum grad_B[N / 16];
        each_part<Role::grad_B>(m, a, w, [&](const PartTile<T, N>& in, TokenSums& sums, int) {
            add_grad_B(in, sums, own.row, grad_B);
        });
        meet();
        for (int k = own.block; k < kQ / 16; ++k)
            add_block(grad_B, left<false>(grad_G, kLdQ, own.row, 16 * k), m.C, 16 * k);
        write_sums(grad_B, a.grad.B, a.B, a.grad.set.B, a.paired_B, a, w, own.row);
    } else {
        each_part<Role::grad_x>(m, a, w, [&](const PartTile<T, N>& in, TokenSums& sums, int v) {
            const Tokens<T, false> x(in.x, own.row, kP / 2 * own.half);
            Sum grad_X[2];
            from_state(in, m.B, sums, own, x, grad_X);
            from_pairs(in, sums, own, x, pairs, grad_X);
            write_grad_x(in, sums, own, a, w, part_at(v, a.ptiles, a.p), x, grad_X);
        });
        store_grad_G(grad_G, pairs, own);
        meet();
    }
}

}  // namespace
}  // namespace ssm::cuda
