// CUDA kernels of ssd_backward. Pass: a block walks backwards over the chunks of one (sequence, head) with
// the state's gradient Z in its registers and leaves Z of each chunk in scratch. Chunk: a block has one chunk
// and one group and goes through the heads of the group, all local; few chunks are cut into slices of heads.
// Reduce: sums over slices, tiles of a head, chunks and time in a fixed order.
#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

constexpr int kPassThreads = 256, kThreads = 512, kReduceThreads = 256, kQuarters = 4, kLdP = kP + kPad,
              kLdQ = kQ + kPad;

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

// ---- Pass
template <class T, int N>
struct PassTile {
    T grad_y[kQ * kLdP], C[kQ * (N + kPad)];
    Decays d;
    float w[kQ];  // exp(l)
};
template <class T, int N>
struct PassTiles {
    PassTile<T, N> in[2];
};

// f(element of the warp's block of a state, its offset) for those inside.
template <int N, class F>
__device__ void each_of_state(Sum (&Z)[N / 32], int rows, int64_t n, const F& f) {
    const int warp = threadIdx.x / kWarp, row = warp % 4 * 16, half = warp / 4;
#pragma unroll
    for (int b = 0; b < N / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = row + row_of(e), j = half * (N / 2) + 16 * b + column_of(e);
            if (i < rows && j < n) f(Z[b].v[e], i * n + j);
        }
    }
}

// A tile on its way: grad y, which is rounded on arrival, waits in registers.
constexpr int kPacks = kQ * kP / 4 / kPassThreads;
struct Arriving {
    Pack<float, 4> grad_y[kPacks];
    float2 raw;
};

template <class T, int N>
__device__ void send(Arriving& r, PassTile<T, N>& m, const BackwardParams<T>& a, const Part& part, int64_t t,
                     int length) {
    copy_tile<kQ, N, kPassThreads>(m.C, a.in.C.data + t * a.in.C.stride + part.h / (a.heads / a.groups) * a.n,
                                   a.in.C.stride, length, static_cast<int>(a.n), a.packed_C);
    const float* from = a.grad_y.data + t * a.grad_y.stride + part.h * a.p + part.p0;
    if (a.packed_grad_y) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            const int i = static_cast<int>(threadIdx.x) + k * kPassThreads, row = i / (kP / 4),
                      column = i % (kP / 4) * 4;
            r.grad_y[k] = {};
            if (row < length && column < part.columns)
                r.grad_y[k] = load_pack<4>(from + row * a.grad_y.stride + column);
        }
    } else {
        load_tile<kQ, kP, kPassThreads>(m.grad_y, from, a.grad_y.stride, length, part.columns, false);
    }
    if (threadIdx.x < kWarp) r.raw = raw_pair(a.in, t, length, part.h);
}
template <class T, int N>
__device__ void receive(const Arriving& r, PassTile<T, N>& m, const BackwardParams<T>& a, const Part& part,
                        int length) {
    if (a.packed_grad_y) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            const int i = static_cast<int>(threadIdx.x) + k * kPassThreads, row = i / (kP / 4),
                      column = i % (kP / 4) * 4;
            Pack<T, 4> v;
#pragma unroll
            for (int e = 0; e < 4; ++e) v.at[e] = from_float<T>(r.grad_y[k].at[e]);
            store_pack(m.grad_y + row * kLdP + column, v);
        }
    }
    if (threadIdx.x < kWarp) {
        make_decays(m.d, a.in, r.raw, length, part.h);
        __syncwarp();
        for (int j = threadIdx.x; j < kQ; j += kWarp) m.w[j] = __expf(m.d.l[j]);
    }
    wait_copies();
}

// Z = exp(l_q) Z + sum_i exp(l_i) grad y_i C_i^T.
template <class T, int N>
__device__ void retreat(Sum (&Z)[N / 32], const PassTile<T, N>& m, int length) {
    const float decay = __expf(m.d.l[kQ - 1]);
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int b = 0; b < N / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) Z[b].v[e] *= decay;
    }
    for (int k = 0; k < length; k += 16) {
        Left<T> g = left<true>(m.grad_y, kLdP, warp % 4 * 16, k);
        scale_columns(g, m.w + k);
#pragma unroll
        for (int b = 0; b < N / 32; ++b)
            multiply(Z[b], g, right<true>(m.C, N + kPad, k, warp / 4 * (N / 2) + 16 * b));
    }
}

template <class T, int N>
__global__ void __launch_bounds__(kPassThreads, 2) Pass(const __grid_constant__ BackwardParams<T> a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<PassTiles<T, N>*>(memory);
    const int64_t parts = a.heads * a.ptiles, s = blockIdx.x / parts;
    const Part part = part_of(a, blockIdx.x % parts);
    const int64_t begin = a.sequences.offset(s), end = a.sequences.offset(s + 1),
                  offset = state_offset(a, part);
    const int64_t first = a.first.offset(s);
    Sum Z[N / 32];
    if (a.grad_final_state.data != nullptr) {
        const float* from = a.grad_final_state.data + s * a.grad_final_state.stride + offset;
        each_of_state<N>(Z, part.columns, a.n, [&](float& z, int64_t at) { z = from[at]; });
    }
    Arriving arriving;
    const auto begin_of = [&](int64_t chunk) { return begin + (chunk - first) * a.chunk; };
    const auto length_of = [&](int64_t chunk) {
        return static_cast<int>(min(end - begin_of(chunk), a.chunk));
    };
    int64_t chunk = a.first.offset(s + 1) - 1;
    if (chunk >= first) {
        send(arriving, m.in[0], a, part, begin_of(chunk), length_of(chunk));
        receive(arriving, m.in[0], a, part, length_of(chunk));
    }
    for (int now = 0; chunk >= first; --chunk, now = 1 - now) {
        __syncthreads();  // this tile is there, the other one is read
        if (chunk > first) send(arriving, m.in[1 - now], a, part, begin_of(chunk - 1), length_of(chunk - 1));
        T* to = a.Z + chunk * a.heads * a.p * a.n + offset;
        each_of_state<N>(Z, part.columns, a.n, [&](float& z, int64_t at) { to[at] = from_float<T>(z); });
        retreat<T, N>(Z, m.in[now], length_of(chunk));
        if (chunk > first) receive(arriving, m.in[1 - now], a, part, length_of(chunk - 1));
    }
    if (a.grad.initial_state.data == nullptr) return;
    float* to = a.grad.initial_state.data + s * a.grad.initial_state.stride + offset;
    each_of_state<N>(Z, part.columns, a.n, [&](float& z, int64_t at) { to[at] += z; });
}

// ---- Chunk. Warp w has the tokens 16 (w % 4) .. and one quarter, w / 4, of the columns of each product.
template <class T, int N>
struct ChunkTiles {
    T x[kQ * kLdP], grad_y[kQ * kLdP], M[kQ * kLdQ];
    T B[kQ * (N + kPad)], C[kQ * (N + kPad)], S[kP * (N + kPad)], Z[kP * (N + kPad)];
    Decays d;
    float e[kQ], r[kQ];  // exp(l), exp(l_q - l)
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
    if (threadIdx.x < kWarp) {
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
    Left<T> g[kP / 16], x[kP / 16];
#pragma unroll
    for (int k = 0; k < kP / 16; ++k) {
        g[k] = left<false>(m.grad_y, kLdP, row, 16 * k);
        x[k] = left<false>(m.x, kLdP, row, 16 * k);
    }
    const int i[2] = {row + row_of(0), row + row_of(2)};
    const float decay[2] = {m.e[i[0]], m.e[i[1]]};
    const float weight[2] = {m.r[i[0]] * m.d.dt[i[0]], m.r[i[1]] * m.d.dt[i[1]]};
    float sums[2] = {};
#pragma unroll
    for (int b = 0; b < N / 64; ++b) {
        const int column = quarter * (N / 4) + 16 * b;
        Sum c, d;
#pragma unroll
        for (int k = 0; k < kP / 16; ++k) {
            multiply(c, g[k], right<true>(m.S, kLdN, 16 * k, column));
            multiply(d, x[k], right<true>(m.Z, kLdN, 16 * k, column));
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int which = e / 2 % 2;
            const float v = decay[which] * c.v[e];
            grad_C[b].v[e] += v;
            sums[which] += v * to_float(m.C[i[which] * kLdN + column + column_of(e)]);
            grad_B[b].v[e] += weight[which] * d.v[e];
        }
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
    const int block = threadIdx.x / kWarp % 4, quarter = threadIdx.x / kWarp / 4, row = 16 * block;
    const View<const float, 2>& D = a.in.D;

    {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // columns 0, 1, 8, 9 of a lane
            const int j = 16 * quarter + column_of(pair % 2 + pair / 2 * 4);
            const bool inside = j < part.columns;
            const float scale = inside && D.data != nullptr
                                    ? D.data[part.h * D.stride + (D.shape[1] == 1 ? 0 : part.p0 + j)]
                                    : 0.0f;
            float sum = 0.0f;
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const int e = pair % 2 + pair / 2 * 4 + 2 * low, i = row + row_of(e);
                const float g = to_float(m.grad_y[i * kLdP + j]);
                sum += g * to_float(m.x[i * kLdP + j]);
                if (!inside || i >= w.length || a.grad.x.data == nullptr) continue;
                a.grad.x.data[(w.begin + i) * a.grad.x.stride + part.h * a.p + part.p0 + j] +=
                    m.d.dt[i] * grad_X.v[e] + scale * g;
            }
#pragma unroll
            for (int offset = 4; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
            if (threadIdx.x % kWarp < 4) m.D[block][j] = sum;
        }
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
        const float raw = raw_dt(a.in, w.begin + i + k, part.h), soft = exact_softplus(raw);
        const bool inside = soft >= a.in.dt_min && soft <= a.in.dt_max;
        const float slope = !a.in.dt_softplus ? 1.0f : inside ? 1.0f / (1.0f + expf(-raw)) : 0.0f;
        a.dt[v * a.tokens + w.begin + i + k] = (xg[k] + A * grad_a[k]) * slope;
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
__global__ void __launch_bounds__(kThreads) Chunk(const __grid_constant__ BackwardParams<T> a) {
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

// ---- Reduce
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceSlices(const __grid_constant__ BackwardParams<T> a) {
    const int64_t width = a.groups * a.n, count = a.tokens * width;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
    if (i >= count) return;
    const auto add = [&](const View<float, 3>& grad, const float* partial) {
        if (grad.data == nullptr) return;
        float sum = 0.0f;
        for (int64_t s = 0; s < a.slices; ++s) sum += partial[s * count + i];
        grad.data[i / width * grad.stride + i % width] += sum;
    };
    add(a.grad.B, a.B);
    add(a.grad.C, a.C);
}

template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceTime(const __grid_constant__ BackwardParams<T> a) {
    const int64_t t = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x, h = blockIdx.y;
    if (t >= a.tokens) return;
    float sum = 0.0f;
    for (int64_t tile = 0; tile < a.ptiles; ++tile) sum += a.dt[(h * a.ptiles + tile) * a.tokens + t];
    a.grad.dt.data[t * a.grad.dt.stride + h] += sum;
}

// A block per head: grad A, grad dt_bias, grad D.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceHead(const __grid_constant__ BackwardParams<T> a) {
    __shared__ float scratch[kReduceThreads / kWarp], columns[kReduceThreads];
    const int64_t h = blockIdx.x, parts = a.heads * a.ptiles;
    float sum_A = 0.0f, sum_dt = 0.0f, sum_D = 0.0f;
    for (int64_t tile = 0; tile < a.ptiles; ++tile) {
        const int64_t v = h * a.ptiles + tile;
        for (int64_t c = threadIdx.x; c < a.chunks; c += kReduceThreads) sum_A += a.A[c * parts + v];
        for (int64_t t = threadIdx.x; t < a.tokens; t += kReduceThreads) sum_dt += a.dt[v * a.tokens + t];
        float column = 0.0f;  // of tile's elements; four threads each
        for (int64_t c = threadIdx.x / kP; c < a.chunks; c += kReduceThreads / kP)
            column += a.D[(c * parts + v) * kP + threadIdx.x % kP];
        sum_D += column;
        __syncthreads();
        columns[threadIdx.x] = column;
        __syncthreads();
        const int64_t j = tile * kP + threadIdx.x;
        if (a.grad.D.data != nullptr && a.grad.D.shape[1] > 1 && threadIdx.x < kP && j < a.p) {
            float sum = 0.0f;
            for (int k = 0; k < kReduceThreads / kP; ++k) sum += columns[k * kP + threadIdx.x];
            a.grad.D.data[h * a.grad.D.stride + j] += sum;
        }
    }
    sum_A = block_sum(sum_A, scratch);
    sum_dt = block_sum(sum_dt, scratch);
    sum_D = block_sum(sum_D, scratch);
    if (threadIdx.x != 0) return;
    if (a.grad.A.data != nullptr) a.grad.A.data[h * a.grad.A.stride] += sum_A;
    if (a.grad.dt_bias.data != nullptr) a.grad.dt_bias.data[h * a.grad.dt_bias.stride] += sum_dt;
    if (a.grad.D.data != nullptr && a.grad.D.shape[1] == 1) a.grad.D.data[h * a.grad.D.stride] += sum_D;
}

// ---- launch
template <class T, int N>
void launch(const Exec& ex, const BackwardParams<T>& a) {
    constexpr std::string_view op = "ssd_backward";
    const cudaStream_t stream = stream_of(ex);
    allow_shared(Pass<T, N>, sizeof(PassTiles<T, N>), op);
    allow_shared(Chunk<T, N>, sizeof(ChunkTiles<T, N>), op);
    Pass<T, N><<<static_cast<unsigned>(a.sequences.count * a.heads * a.ptiles), kPassThreads,
                 sizeof(PassTiles<T, N>), stream>>>(a);
    check_launch(op);
    if (a.tokens == 0) return;
    const dim3 blocks(static_cast<unsigned>(a.chunks), static_cast<unsigned>(a.groups * a.slices));
    Chunk<T, N><<<blocks, kThreads, sizeof(ChunkTiles<T, N>), stream>>>(a);
    check_launch(op);
    if (a.slices > 1 && (a.grad.B || a.grad.C)) {
        ReduceSlices<T>
            <<<blocks_for(a.tokens * a.groups * a.n, kReduceThreads), kReduceThreads, 0, stream>>>(a);
        check_launch(op);
    }
    if (a.grad.dt) {
        const dim3 grid(blocks_for(a.tokens, kReduceThreads), static_cast<unsigned>(a.heads));
        ReduceTime<T><<<grid, kReduceThreads, 0, stream>>>(a);
        check_launch(op);
    }
    ReduceHead<T><<<static_cast<unsigned>(a.heads), kReduceThreads, 0, stream>>>(a);
    check_launch(op);
}

template <class T>
BackwardParams<T> make_params(const SsdInputs<T>& in, View<const float, 4> chunk_states,
                              View<const float, 3> grad_y, View<const float, 4> grad_final_state,
                              const SsdGradients& grad) {
    BackwardParams<T> a{in, chunk_states, grad_final_state, grad_y, grad};
    a.heads = in.x.shape[1];
    a.p = in.x.shape[2];
    a.groups = in.B.shape[1];
    a.n = in.B.shape[2];
    a.tokens = in.x.shape[0];
    a.ptiles = tiles_of(a.p, kP);
    a.packed_x = packed16(in.x.data, in.x.stride, in.x.shape);
    a.packed_B = packed16(in.B.data, in.B.stride, in.B.shape);
    a.packed_C = packed16(in.C.data, in.C.stride, in.C.shape);
    a.packed_grad_y = packed16(grad_y.data, grad_y.stride, grad_y.shape);
    a.packed_state = packed16(chunk_states.data, chunk_states.stride, chunk_states.shape);
    a.packed_Z = a.n % (16 / static_cast<int64_t>(sizeof(T))) == 0;
    return a;
}

// As many slices of a group's heads as fill the device twice over.
template <class T>
int64_t slices_of(const Exec& ex, const BackwardParams<T>& a) {
    const int64_t blocks = std::max<int64_t>(1, a.chunks * a.groups), wanted = 2 * ex.cuda->multiprocessors();
    return std::clamp<int64_t>((wanted + blocks - 1) / blocks, 1, a.heads / a.groups * a.ptiles);
}

template <class T>
void backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
              View<const float, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients& grad,
              int64_t chunk) {
    BackwardParams<T> a = make_params(in, chunk_states, grad_y, grad_final_state, grad);
    const std::vector<int64_t> first = first_chunks(in.cu_seqlens, chunk);
    const SequencesOnDevice sequences(ex, in.cu_seqlens), first_there(ex, first);
    a.sequences = sequences.get();
    a.first = first_there.get();
    a.chunk = chunk;
    a.chunks = first.back();
    a.slices = slices_of(ex, a);
    const auto size = [](int64_t count) { return static_cast<size_t>(std::max<int64_t>(count, 1)); };
    const int64_t parts = a.heads * a.ptiles;
    const int64_t partial = a.slices > 1 ? a.slices * a.tokens * a.groups * a.n : 0;
    const Scratch<T> Z(ex, size(a.chunks * a.heads * a.p * a.n));
    const Scratch<float> dt(ex, size(parts * a.tokens)), A(ex, size(a.chunks * parts)),
        D(ex, size(a.chunks * parts * kP)), B(ex, size(partial)), C(ex, size(partial));
    a.Z = Z.data();
    a.dt = dt.data();
    a.A = A.data();
    a.D = D.data();
    a.B = B.data();
    a.C = C.data();
    if (a.n <= 64) {
        launch<T, 64>(ex, a);
    } else {
        launch<T, kMaxN>(ex, a);
    }
}

}  // namespace

template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const float, 3> grad_y, View<const float, 4> grad_final_state,
                  const SsdGradients& grad, int64_t chunk) {
    require_state_width("ssd_backward", in.B.shape[2]);
    if (chunk <= kQ) return backward(ex, in, chunk_states, grad_y, grad_final_state, grad, chunk);
    // Longer chunks are cut; the states entering the pieces are computed again.
    const int64_t chunks = first_chunks(in.cu_seqlens, kQ).back();
    const std::array<int64_t, 4> shape{chunks, in.x.shape[1], in.x.shape[2], in.B.shape[2]};
    const Scratch<float> memory(
        ex, static_cast<size_t>(std::max<int64_t>(1, shape[0] * shape[1] * shape[2] * shape[3])));
    const View<float, 4> states(memory.data(), shape);
    ssd<T>(ex, in, View<T, 3>(), View<float, 4>(), states, kQ);
    backward(ex, in, View<const float, 4>(states), grad_y, grad_final_state, grad, kQ);
}

template void ssd_backward(const Exec&, const SsdInputs<float>&, View<const float, 4>, View<const float, 3>,
                           View<const float, 4>, const SsdGradients&, int64_t);
template void ssd_backward(const Exec&, const SsdInputs<bf16>&, View<const float, 4>, View<const float, 3>,
                           View<const float, 4>, const SsdGradients&, int64_t);

}  // namespace ssm::cuda
