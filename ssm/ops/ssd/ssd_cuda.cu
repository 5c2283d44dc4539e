// CUDA kernels of ssd. A block walks over the chunks of one (sequence, head); the state stays in
// its registers from the first chunk to the last, so that no state but those asked for goes through memory.
#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

// A warp owns 16 tokens, and in the state 16 elements of the head, and one half, w / 4, of the columns of
// each product. The later the tokens, the more products: the halves count from opposite ends, since the warps
// w and w + 4 share a tensor core.
constexpr int kThreads = 256;
__device__ inline int own_row() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    return 16 * (warp < 4 ? warp : 7 - warp);
}
__device__ inline int own_half() { return static_cast<int>(threadIdx.x) / kWarp / 4; }

template <class T>
struct ForwardParams {
    SsdInputs<T> in;
    View<T, 3> y;
    View<float, 4> final_state, chunk_states;
    Sequences sequences, first;  // tokens, and saved chunks, of each sequence
    int64_t chunk, ptiles;
    bool packed_x, packed_B, packed_C, packed_y;  // for 16 bytes; y: for pairs
};

template <class T, int N>
struct InputTile {
    T x[kQ * (kP + kPad)], B[kQ * (N + kPad)], C[kQ * (N + kPad)];
    Decays d;
    float w[kQ];  // dt times the decay to the chunk's end
};
// One tile is used while the next one arrives.
template <class T, int N>
struct ForwardTiles {
    InputTile<T, N> in[2];
    T S[kP * (N + kPad)];
    float D[kP];
};

// 64 tokens at most, within one chunk.
struct Span {
    int64_t begin, chunk_end;
    int length;
};

// What a block works on.
struct Head {
    int64_t s, h, group, p0, state_at;  // state_at: offset of [p0][0] in a row of [s h p n]
    int columns, n;                     // of p in this tile
};

template <class T>
__device__ Head head_of_block(const SsdInputs<T>& in, int64_t ptiles) {
    const int64_t heads = in.x.shape[1], p = in.x.shape[2], groups = in.B.shape[1], n = in.B.shape[2];
    const int64_t v = blockIdx.x % (heads * ptiles), h = v / ptiles, p0 = v % ptiles * kP;
    return {blockIdx.x / (heads * ptiles),
            h,
            h / (heads / groups),
            p0,
            (h * p + p0) * n,
            static_cast<int>(min(p - p0, static_cast<int64_t>(kP))),
            static_cast<int>(n)};
}

// The warp's 16 rows of a state [p n] in memory; outside of it 0 is read and nothing written.
template <int N>
__device__ void read_state(Sum (&S)[N / 32], const float* from, const Head& a) {
    const int row = own_row();
#pragma unroll
    for (int b = 0; b < N / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = row + row_of(e), j = own_half() * (N / 2) + 16 * b + column_of(e);
            S[b].v[e] = i < a.columns && j < a.n ? from[i * a.n + j] : 0.0f;
        }
    }
}
template <int N>
__device__ void write_state(float* to, const Sum (&S)[N / 32], const Head& a) {
    const int row = own_row();
#pragma unroll
    for (int b = 0; b < N / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = row + row_of(e), j = own_half() * (N / 2) + 16 * b + column_of(e);
            if (i >= a.columns || j >= a.n) continue;
            if (a.n % 2 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
                store_pack(to + i * a.n + j, Pack<float, 2>{{S[b].v[e], S[b].v[e + 1]}});
            } else {
                to[i * a.n + j] = S[b].v[e];
                if (j + 1 < a.n) to[i * a.n + j + 1] = S[b].v[e + 1];
            }
        }
    }
}

// The warp's block of y = exp(l) C S^T + M X, M = exp(l_i - l_j) dt_j C B^T below and on the diagonal. Both
// halves make M for themselves: cheaper than passing it on.
template <class T, int N>
__device__ void outputs(Sum (&Y)[2], const InputTile<T, N>& m, const T* S) {
    constexpr int kLdN = N + kPad, kLdP = kP + kPad;
    const int row = own_row(), column = 32 * own_half();
    Left<T> C[N / 16];
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        C[k] = left<false>(m.C, kLdN, row, 16 * k);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply(Y[b], C[k], right<false>(S, kLdN, 16 * k, column + 16 * b));
    }
    const float l[2] = {m.d.l[row + row_of(0)], m.d.l[row + row_of(2)]};
    const float decay[2] = {__expf(l[0]), __expf(l[1])};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) Y[b].v[e] *= decay[e / 2 % 2];
    }
#pragma unroll 1
    for (int first = 0; first <= row; first += 16) {
        Sum G;
#pragma unroll
        for (int k = 0; k < N / 16; ++k) multiply(G, C[k], right<false>(m.B, kLdN, 16 * k, first));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int j = first + column_of(e);
            const bool seen = j <= row + row_of(e);
            G.v[e] = seen ? G.v[e] * __expf(l[e / 2 % 2] - m.d.l[j]) * m.d.dt[j] : 0.0f;
        }
        const Left<T> M = as_left<T>(G);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply(Y[b], M, right<true>(m.x, kLdP, first, column + 16 * b));
    }
}

// y + D x to memory, a lane's pairs.
template <class T>
__device__ void write_y(const ForwardParams<T>& p, const Head& a, const Sum (&Y)[2], const T* x,
                        const float* D, const Span& span) {
    T* const to = p.y.data + span.begin * p.y.stride + a.h * p.in.x.shape[2] + a.p0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = own_row() + row_of(e), j = 32 * own_half() + 16 * b + column_of(e);
            if (i >= span.length || j >= a.columns) continue;
            Pack<T, 2> v;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float y = Y[b].v[e + k] + D[j + k] * to_float(x[i * (kP + kPad) + j + k]);
                v.at[k] = from_float<T>(y);
            }
            if (p.packed_y) {
                store_pack(to + i * p.y.stride + j, v);
            } else {
                to[i * p.y.stride + j] = v.at[0];
                if (j + 1 < a.columns) to[i * p.y.stride + j + 1] = v.at[1];
            }
        }
    }
}

// S = exp(l_q) S + sum_j w_j x_j B_j^T.
template <class T, int N>
__device__ void advance(Sum (&S)[N / 32], const InputTile<T, N>& m, int length) {
    const float decay = __expf(m.d.l[kQ - 1]);
#pragma unroll
    for (int b = 0; b < N / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) S[b].v[e] *= decay;
    }
    for (int k = 0; k < length; k += 16) {
        Left<T> x = left<true>(m.x, kP + kPad, own_row(), k);
        scale_columns(x, m.w + k);
#pragma unroll
        for (int b = 0; b < N / 32; ++b)
            multiply(S[b], x, right<true>(m.B, N + kPad, k, own_half() * (N / 2) + 16 * b));
    }
}

template <class T, int N>
__device__ void fetch(InputTile<T, N>& m, const ForwardParams<T>& p, const Head& a, const Span& span) {
    const SsdInputs<T>& in = p.in;
    const int64_t t = span.begin;
    copy_tile<kQ, kP, kThreads>(m.x, in.x.data + t * in.x.stride + a.h * in.x.shape[2] + a.p0, in.x.stride,
                                span.length, a.columns, p.packed_x);
    copy_tile<kQ, N, kThreads>(m.B, in.B.data + t * in.B.stride + a.group * a.n, in.B.stride, span.length,
                               a.n, p.packed_B);
    copy_tile<kQ, N, kThreads>(m.C, in.C.data + t * in.C.stride + a.group * a.n, in.C.stride, span.length,
                               a.n, p.packed_C);
}

// By one warp.
template <class T, int N>
__device__ void make_weights(InputTile<T, N>& m, const ForwardParams<T>& p, float2 raw, int length,
                             int64_t h) {
    make_decays(m.d, p.in, raw, length, h);
    __syncwarp();
    for (int j = threadIdx.x % kWarp; j < kQ; j += kWarp)
        m.w[j] = m.d.dt[j] * __expf(m.d.l[kQ - 1] - m.d.l[j]);
}

// The tokens at `t` of a sequence that ends at `end`; `chunk_end`: of the tokens before.
__device__ inline Span span_at(int64_t t, int64_t chunk_end, int64_t end, int64_t chunk) {
    if (t == chunk_end) chunk_end = min(end, t + chunk);
    return {t, chunk_end, static_cast<int>(min(chunk_end - t, static_cast<int64_t>(kQ)))};
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    Forward(const __grid_constant__ ForwardParams<T> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<ForwardTiles<T, N>*>(memory);
    const Head a = head_of_block(p.in, p.ptiles);
    const int64_t begin = p.sequences.offset(a.s), end = p.sequences.offset(a.s + 1);
    const bool decays = threadIdx.x < kWarp;
    Sum S[N / 32];
    if (p.in.initial_state.data != nullptr)
        read_state<N>(S, p.in.initial_state.data + a.s * p.in.initial_state.stride + a.state_at, a);
    int64_t saved = p.first.offset(a.s);
    Span span = span_at(begin, begin, end, p.chunk);
    bool chunk_begins = true;
    if (threadIdx.x < kP) load_D(m.D, p.in.D, a.h, a.p0, a.columns);
    fetch(m.in[0], p, a, span);
    if (decays) make_weights(m.in[0], p, raw_pair(p.in, begin, span.length, a.h), span.length, a.h);
    for (int now = 0; span.length > 0; now = 1 - now) {
#pragma unroll
        for (int b = 0; b < N / 32; ++b)
            store(m.S + own_row() * (N + kPad) + own_half() * (N / 2) + 16 * b, N + kPad, S[b]);
        if (chunk_begins && p.chunk_states.data != nullptr)
            write_state<N>(p.chunk_states.data + saved++ * p.chunk_states.stride + a.state_at, S, a);
        wait_copies();
        __syncthreads();
        const int64_t after = span.begin + span.length;
        const Span next = span_at(after, span.chunk_end, end, p.chunk);
        float2 raw{};
        if (next.length > 0) {
            fetch(m.in[1 - now], p, a, next);
            if (decays) raw = raw_pair(p.in, next.begin, next.length, a.h);
        }
        if (p.y.data != nullptr) {
            Sum Y[2];
            outputs<T, N>(Y, m.in[now], m.S);
            write_y<T>(p, a, Y, m.in[now].x, m.D, span);
        }
        advance<T, N>(S, m.in[now], span.length);
        if (decays) make_weights(m.in[1 - now], p, raw, next.length, a.h);
        chunk_begins = after == span.chunk_end;
        span = next;
        __syncthreads();  // this tile and S are read
    }
    wait_copies();
    if (p.final_state.data != nullptr)
        write_state<N>(p.final_state.data + a.s * p.final_state.stride + a.state_at, S, a);
}

template <class T, int N>
void launch_forward(const Exec& ex, const ForwardParams<T>& p) {
    const int64_t blocks = p.sequences.count * p.in.x.shape[1] * p.ptiles;
    constexpr size_t kBytes = sizeof(ForwardTiles<T, N>);
    allow_shared(Forward<T, N>, kBytes, "ssd");
    Forward<T, N><<<static_cast<unsigned>(blocks), kThreads, kBytes, stream_of(ex)>>>(p);
    check_launch("ssd");
}

}  // namespace

template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, int64_t chunk) {
    require_state_width("ssd", in.B.shape[2]);
    const std::vector<int64_t> first = first_chunks(in.cu_seqlens, chunk);
    const SequencesOnDevice sequences(ex, in.cu_seqlens), first_there(ex, first);
    ForwardParams<T> p{in, y, final_state, chunk_states, sequences.get(), first_there.get()};
    p.chunk = chunk_states ? chunk : kQ;  // without states to save any chunks do
    p.ptiles = tiles_of(in.x.shape[2], kP);
    p.packed_x = packed16(in.x.data, in.x.stride, in.x.shape);
    p.packed_B = packed16(in.B.data, in.B.stride, in.B.shape);
    p.packed_C = packed16(in.C.data, in.C.stride, in.C.shape);
    p.packed_y = packable(y.data, y.stride, 2) && y.shape[2] % 2 == 0;
    if (in.B.shape[2] <= 64) {
        launch_forward<T, 64>(ex, p);
    } else {
        launch_forward<T, kMaxN>(ex, p);
    }
}

template void ssd(const Exec&, const SsdInputs<float>&, View<float, 3>, View<float, 4>, View<float, 4>,
                  int64_t);
template void ssd(const Exec&, const SsdInputs<bf16>&, View<bf16, 3>, View<float, 4>, View<float, 4>,
                  int64_t);

}  // namespace ssm::cuda
