// CUDA kernels of ssd and ssd_step. A block walks over the chunks of one (sequence, head); the state stays in
// its registers from the first chunk to the last, so that no state but those asked for goes through memory.
#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 128;  // a warp owns 16 of the 64 tokens and 16 of the 64 elements of the head

template <class T>
struct ForwardParams {
    SsdInputs<T> in;
    View<T, 3> y;
    View<float, 4> final_state, chunk_states;
    Sequences sequences, first;  // tokens, and saved chunks, of each sequence
    int64_t chunk, ptiles;
    bool packed_x, packed_B, packed_C, packed_y;
};

template <class T, int N>
struct ForwardTiles {
    T x[kQ * (kP + kPad)], B[kQ * (N + kPad)], C[kQ * (N + kPad)], S[kP * (N + kPad)];
    Decays d;
    float w[kQ];  // dt times the decay to the chunk's end
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
__device__ void read_state(Sum (&S)[N / 16], const float* from, const Head& a) {
    const int row = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int b = 0; b < N / 16; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = row + row_of(e), j = 16 * b + column_of(e);
            S[b].v[e] = i < a.columns && j < a.n ? from[i * a.n + j] : 0.0f;
        }
    }
}
template <int N>
__device__ void write_state(float* to, const Sum (&S)[N / 16], const Head& a) {
    const int row = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int b = 0; b < N / 16; ++b) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = row + row_of(e), j = 16 * b + column_of(e);
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

// The warp's 16 tokens of y = exp(l) C S^T + M X, M = exp(l_i - l_j) dt_j C B^T below and on the diagonal.
template <class T, int N>
__device__ void outputs(Sum (&Y)[kP / 16], const ForwardTiles<T, N>& m) {
    constexpr int kLdN = N + kPad, kLdP = kP + kPad;
    const int block = threadIdx.x / kWarp, row = 16 * block;
    Sum G[kQ / 16];
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const Left<T> C = left<false>(m.C, kLdN, row, k);
#pragma unroll
        for (int b = 0; b < kQ / 16; ++b)
            if (b <= block) multiply(G[b], C, right<false>(m.B, kLdN, k, 16 * b));
#pragma unroll
        for (int b = 0; b < kP / 16; ++b) multiply(Y[b], C, right<false>(m.S, kLdN, k, 16 * b));
    }
    const float l[2] = {m.d.l[row + row_of(0)], m.d.l[row + row_of(2)]};
    const float decay[2] = {__expf(l[0]), __expf(l[1])};
#pragma unroll
    for (int b = 0; b < kP / 16; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) Y[b].v[e] *= decay[e / 2 % 2];
    }
#pragma unroll
    for (int b = 0; b < kQ / 16; ++b) {
        if (b > block) break;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int j = 16 * b + column_of(e);
            const bool seen = j <= row + row_of(e);
            G[b].v[e] = seen ? G[b].v[e] * __expf(l[e / 2 % 2] - m.d.l[j]) * m.d.dt[j] : 0.0f;
        }
        const Left<T> M = as_left<T>(G[b]);
#pragma unroll
        for (int c = 0; c < kP / 16; ++c) multiply(Y[c], M, right<true>(m.x, kLdP, 16 * b, 16 * c));
    }
}

// y + D x through the warp's own rows of `stage` (those of C, which no other warp reads) to memory.
template <class T>
__device__ void write_y(const ForwardParams<T>& p, const Head& a, Sum (&Y)[kP / 16], T* stage, int ld,
                        const T* x, int64_t begin, int length) {
    const int row = threadIdx.x / kWarp * 16;
    const View<const float, 2>& D = p.in.D;
#pragma unroll
    for (int b = 0; b < kP / 16; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int j = 16 * b + column_of(e);
            if (D.data != nullptr && j < a.columns) {
                const float scale = D.data[a.h * D.stride + (D.shape[1] == 1 ? 0 : a.p0 + j)];
                Y[b].v[e] += scale * to_float(x[(row + row_of(e)) * (kP + kPad) + j]);
            }
        }
        store(stage + row * ld + 16 * b, ld, Y[b]);
    }
    __syncwarp();
    constexpr int kPack = 16 / sizeof(T);
    T* const to = p.y.data + begin * p.y.stride + a.h * p.in.x.shape[2] + a.p0;
    const int lane = threadIdx.x % kWarp, step = p.packed_y ? kPack : 1, steps = kP / step;
    for (int i = lane; i < 16 * steps; i += kWarp) {
        const int r = row + i / steps, j = i % steps * step;
        if (r >= length || j >= a.columns) continue;
        if (p.packed_y) {
            store_pack(to + r * p.y.stride + j, load_pack<kPack>(stage + r * ld + j));
        } else {
            to[r * p.y.stride + j] = stage[r * ld + j];
        }
    }
}

// S = exp(l_q) S + sum_j w_j x_j B_j^T.
template <class T, int N>
__device__ void advance(Sum (&S)[N / 16], const ForwardTiles<T, N>& m, int length) {
    const int row = threadIdx.x / kWarp * 16;
    const float decay = __expf(m.d.l[kQ - 1]);
#pragma unroll
    for (int b = 0; b < N / 16; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) S[b].v[e] *= decay;
    }
    for (int k = 0; k < length; k += 16) {
        Left<T> x = left<true>(m.x, kP + kPad, row, k);
        scale_columns(x, m.w + k);
#pragma unroll
        for (int b = 0; b < N / 16; ++b) multiply(S[b], x, right<true>(m.B, N + kPad, k, 16 * b));
    }
}

template <class T, int N>
__device__ void load_inputs(ForwardTiles<T, N>& m, const ForwardParams<T>& p, const Head& a, int64_t t,
                            int length) {
    const SsdInputs<T>& in = p.in;
    load_tile<kQ, kP, kThreads>(m.x, in.x.data + t * in.x.stride + a.h * in.x.shape[2] + a.p0, in.x.stride,
                                length, a.columns, p.packed_x);
    load_tile<kQ, N, kThreads>(m.B, in.B.data + t * in.B.stride + a.group * a.n, in.B.stride, length, a.n,
                               p.packed_B);
    load_tile<kQ, N, kThreads>(m.C, in.C.data + t * in.C.stride + a.group * a.n, in.C.stride, length, a.n,
                               p.packed_C);
    if (threadIdx.x < kWarp) {
        make_decays(m.d, in, t, length, a.h);
        __syncwarp();
        for (int j = threadIdx.x; j < kQ; j += kWarp) m.w[j] = m.d.dt[j] * __expf(m.d.l[kQ - 1] - m.d.l[j]);
    }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) Forward(const __grid_constant__ ForwardParams<T> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<ForwardTiles<T, N>*>(memory);
    const Head a = head_of_block(p.in, p.ptiles);
    const int64_t begin = p.sequences.offset(a.s), end = p.sequences.offset(a.s + 1);
    Sum S[N / 16];
    if (p.in.initial_state.data != nullptr)
        read_state<N>(S, p.in.initial_state.data + a.s * p.in.initial_state.stride + a.state_at, a);
    int64_t saved = p.first.offset(a.s), chunk_begin = begin;
    for (int64_t t = begin; t < end;) {
        const int64_t chunk_end = min(end, chunk_begin + p.chunk);
        const int length = static_cast<int>(min(chunk_end - t, static_cast<int64_t>(kQ)));
        __syncthreads();  // the last tile is read
        load_inputs(m, p, a, t, length);
#pragma unroll
        for (int b = 0; b < N / 16; ++b)
            store(m.S + threadIdx.x / kWarp * 16 * (N + kPad) + 16 * b, N + kPad, S[b]);
        if (t == chunk_begin && p.chunk_states.data != nullptr)
            write_state<N>(p.chunk_states.data + saved * p.chunk_states.stride + a.state_at, S, a);
        __syncthreads();
        if (p.y.data != nullptr) {
            Sum Y[kP / 16];
            outputs<T, N>(Y, m);
            write_y<T>(p, a, Y, m.C, N + kPad, m.x, t, length);
        }
        advance<T, N>(S, m, length);
        t += length;
        if (t == chunk_end) chunk_begin = t, ++saved;
    }
    if (p.final_state.data != nullptr)
        write_state<N>(p.final_state.data + a.s * p.final_state.stride + a.state_at, S, a);
}

template <class T>
struct StepParams {
    SsdInputs<T> in;
    View<float, 4> state;
    View<T, 3> y;
};

constexpr int kStepThreads = 256, kRowLanes = 8, kStepRows = kStepThreads / kRowLanes;

// Eight lanes take a row of a state, W elements at a time.
template <class T, int W>
__global__ void __launch_bounds__(kStepThreads) Step(const __grid_constant__ StepParams<T> a) {
    const SsdInputs<T>& in = a.in;
    const int64_t heads = in.x.shape[1], p = in.x.shape[2], groups = in.B.shape[1], n = in.B.shape[2];
    const int64_t s = blockIdx.x / heads, h = blockIdx.x % heads, group = h / (heads / groups);
    const int64_t i = blockIdx.y * kStepRows + threadIdx.x / kRowLanes;
    const float dt = step_size(in, s, h), decay = expf(dt * in.A.data[h * in.A.stride]);
    const bool inside = i < p;
    const float x = inside ? to_float(in.x.data[s * in.x.stride + h * p + i]) : 0.0f;
    const T* B = in.B.data + s * in.B.stride + group * n;
    const T* C = in.C.data + s * in.C.stride + group * n;
    float* S = a.state.data + s * a.state.stride + (h * p + i) * n;
    float y = 0.0f;
#pragma unroll 4
    for (int64_t k = threadIdx.x % kRowLanes * W; inside && k < n; k += kRowLanes * W) {
        Pack<float, W> v = load_pack<W>(S + k);
        const Pack<T, W> b = load_pack<W>(B + k), c = load_pack<W>(C + k);
#pragma unroll
        for (int e = 0; e < W; ++e) {
            v.at[e] = decay * v.at[e] + dt * x * to_float(b.at[e]);
            y += v.at[e] * to_float(c.at[e]);
        }
        store_pack(S + k, v);
    }
#pragma unroll
    for (int offset = 1; offset < kRowLanes; offset *= 2) y += __shfl_xor_sync(kAllLanes, y, offset);
    if (!inside || threadIdx.x % kRowLanes != 0) return;
    if (in.D.data != nullptr) y += in.D.data[h * in.D.stride + (in.D.shape[1] == 1 ? 0 : i)] * x;
    a.y.data[s * a.y.stride + h * p + i] = from_float<T>(y);
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
    p.packed_y = packed16(y.data, y.stride, y.shape);
    if (in.B.shape[2] <= 64) {
        launch_forward<T, 64>(ex, p);
    } else {
        launch_forward<T, kMaxN>(ex, p);
    }
}

template <class T>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<float, 4> state, View<T, 3> y) {
    const StepParams<T> p{in, state, y};
    const dim3 blocks(static_cast<unsigned>(in.x.shape[0] * in.x.shape[1]),
                      blocks_for(in.x.shape[2], kStepRows));
    if (in.B.shape[2] % 4 == 0 && packable(state.data, state.stride, 4) &&
        packable(in.B.data, in.B.stride, 4) && packable(in.C.data, in.C.stride, 4)) {
        Step<T, 4><<<blocks, kStepThreads, 0, stream_of(ex)>>>(p);
    } else {
        Step<T, 1><<<blocks, kStepThreads, 0, stream_of(ex)>>>(p);
    }
    check_launch("ssd_step");
}

template void ssd(const Exec&, const SsdInputs<float>&, View<float, 3>, View<float, 4>, View<float, 4>,
                  int64_t);
template void ssd(const Exec&, const SsdInputs<bf16>&, View<bf16, 3>, View<float, 4>, View<float, 4>,
                  int64_t);
template void ssd_step(const Exec&, const SsdInputs<float>&, View<float, 4>, View<float, 3>);
template void ssd_step(const Exec&, const SsdInputs<bf16>&, View<float, 4>, View<bf16, 3>);

}  // namespace ssm::cuda
