// CUDA kernels of ssd_backward. Pass: a block walks backwards over the chunks of one (sequence, head) with
// the state's gradient Z in its registers and leaves Z of each chunk in scratch. Chunk: a block has one chunk
// and one group and goes through the heads of the group, all local; few chunks are cut into slices of heads.
// Reduce: sums over slices, tiles of a head, chunks and time in a fixed order.
#include "ssm/ops/ssd/ssd_backward_chunk.cuh"

namespace ssm::cuda {
namespace {

constexpr int kPassThreads = 256, kReduceThreads = 256;

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

// A tile on its way, its raw time steps in a warp's registers.
template <class T, int N>
__device__ float2 send(PassTile<T, N>& m, const BackwardParams<T>& a, const Part& part, int64_t t,
                       int length) {
    copy_tile<kQ, N, kPassThreads>(m.C, a.in.C.data + t * a.in.C.stride + part.h / (a.heads / a.groups) * a.n,
                                   a.in.C.stride, length, static_cast<int>(a.n), a.packed_C);
    copy_tile<kQ, kP, kPassThreads>(m.grad_y, a.grad_y.data + t * a.grad_y.stride + part.h * a.p + part.p0,
                                    a.grad_y.stride, length, part.columns, a.packed_grad_y);
    return threadIdx.x < kWarp ? raw_pair(a.in, t, length, part.h) : float2{};
}
template <class T, int N>
__device__ void receive(PassTile<T, N>& m, const BackwardParams<T>& a, const Part& part, float2 raw,
                        int length) {
    if (threadIdx.x < kWarp) {
        make_decays(m.d, a.in, raw, length, part.h);
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
    float2 raw{};
    const auto begin_of = [&](int64_t chunk) { return begin + (chunk - first) * a.chunk; };
    const auto length_of = [&](int64_t chunk) {
        return static_cast<int>(min(end - begin_of(chunk), a.chunk));
    };
    int64_t chunk = a.first.offset(s + 1) - 1;
    if (chunk >= first) {
        raw = send(m.in[0], a, part, begin_of(chunk), length_of(chunk));
        receive(m.in[0], a, part, raw, length_of(chunk));
    }
    for (int now = 0; chunk >= first; --chunk, now = 1 - now) {
        __syncthreads();  // this tile is there, the other one is read
        if (chunk > first) raw = send(m.in[1 - now], a, part, begin_of(chunk - 1), length_of(chunk - 1));
        T* to = a.Z + chunk * a.heads * a.p * a.n + offset;
        each_of_state<N>(Z, part.columns, a.n, [&](float& z, int64_t at) { to[at] = from_float<T>(z); });
        retreat<T, N>(Z, m.in[now], length_of(chunk));
        if (chunk > first) receive(m.in[1 - now], a, part, raw, length_of(chunk - 1));
    }
    if (a.grad.initial_state.data == nullptr) return;
    float* to = a.grad.initial_state.data + s * a.grad.initial_state.stride + offset;
    each_of_state<N>(Z, part.columns, a.n, [&](float& z, int64_t at) { to[at] += z; });
}

// ---- Reduce
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceSlices(const __grid_constant__ BackwardParams<T> a) {
    const int64_t width = a.groups * a.n, count = a.tokens * width;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
    if (i >= count) return;
    const auto give = [&](const View<T, 3>& grad, const float* partial, bool set) {
        if (grad.data == nullptr) return;
        float sum = 0.0f;
        for (int64_t s = 0; s < a.slices; ++s) sum += partial[s * count + i];
        T& to = grad.data[i / width * grad.stride + i % width];
        to = from_float<T>(set ? sum : to_float(to) + sum);
    };
    give(a.grad.B, a.B, a.grad.set.B);
    give(a.grad.C, a.C, a.grad.set.C);
}

// Read along the tokens, written along the heads: kWarp of each.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) ReduceTime(const __grid_constant__ BackwardParams<T> a) {
    constexpr int kStep = kReduceThreads / kWarp;
    __shared__ float sums[kWarp][kWarp + 1];
    const int x = threadIdx.x % kWarp, y = threadIdx.x / kWarp;
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kWarp,
                  h0 = static_cast<int64_t>(blockIdx.y) * kWarp;
    for (int i = y; i < kWarp && t0 + x < a.tokens && h0 + i < a.heads; i += kStep) {
        float sum = 0.0f;
        for (int64_t tile = 0; tile < a.ptiles; ++tile)
            sum += a.dt[((h0 + i) * a.ptiles + tile) * a.tokens + t0 + x];
        sums[i][x] = sum;
    }
    __syncthreads();
    for (int i = y; i < kWarp && t0 + i < a.tokens && h0 + x < a.heads; i += kStep) {
        T& to = a.grad.dt.data[(t0 + i) * a.grad.dt.stride + h0 + x];
        to = from_float<T>(a.grad.set.dt ? sums[x][i] : to_float(to) + sums[x][i]);
    }
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
        const dim3 grid(blocks_for(a.tokens, kWarp), blocks_for(a.heads, kWarp));
        ReduceTime<T><<<grid, kReduceThreads, 0, stream>>>(a);
        check_launch(op);
    }
    ReduceHead<T><<<static_cast<unsigned>(a.heads), kReduceThreads, 0, stream>>>(a);
    check_launch(op);
}

template <class T>
BackwardParams<T> make_params(const SsdInputs<T>& in, View<const float, 4> chunk_states,
                              View<const T, 3> grad_y, View<const float, 4> grad_final_state,
                              const SsdGradients<T>& grad) {
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
    a.paired_x = packable(grad.x.data, grad.x.stride, 2) && a.p % 2 == 0;
    a.paired_B = packable(grad.B.data, grad.B.stride, 2) && a.n % 2 == 0;
    a.paired_C = packable(grad.C.data, grad.C.stride, 2) && a.n % 2 == 0;
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
              View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
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
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  int64_t chunk) {
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
                           View<const float, 4>, const SsdGradients<float>&, int64_t);
template void ssd_backward(const Exec&, const SsdInputs<bf16>&, View<const float, 4>, View<const bf16, 3>,
                           View<const float, 4>, const SsdGradients<bf16>&, int64_t);

}  // namespace ssm::cuda
