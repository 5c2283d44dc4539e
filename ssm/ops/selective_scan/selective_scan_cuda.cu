// CUDA kernels of the selective scan, forward and one step; selective_scan_cuda.cuh says who owns what.
#include <type_traits>

#include "ssm/ops/selective_scan/selective_scan_cuda.cuh"

namespace ssm::cuda {
namespace {

template <class T>
struct ScanParams {
    View<const T, 2> u, z;
    View<const float, 2> delta, A, B, C;
    const float* D;
    const float* bias;
    bool softplus;
    Segments segments, first_chunk;  // first_chunk.first: of the sequences' chunks
    int64_t chunk, d_blocks;
    const float* entering;  // [segments d n] when split, else the initial states [s d n]; or absent
    View<T, 2> y;
    float* final_state;
    float* chunk_states;
    float* ends;  // [segments d n], without y: the state at the end, and the sums of dt [segments d]
    float* sums;
};

template <class T, int K, int S>
struct Incoming {
    PairTile<T, K, S> u, z;
    PairTile<float, K, S> delta;
    RowTile<K, S> B, C;

    template <bool kY>
    __device__ void load(const ScanParams<T>& p, int64_t t0, int64_t end, int64_t d0) {
        const int count = static_cast<int>(end - t0 < kTile ? end - t0 : kTile);
        delta.load(p.delta, t0, count, d0);
        u.load(p.u, t0, count, d0);
        B.load(p.B, t0, count);
        if constexpr (kY) {
            z.load(p.z, t0, count, d0);
            C.load(p.C, t0, count);
        }
    }
};

template <int K, int S>
struct Shared {
    float2 step[kTile][Block<K, S>::kChannels];  // dt, dt u
    float B[kTile][K * S], C[kTile][K * S];
    float y[kTile][kThreads];  // sum over the thread's states

    template <class T, bool kY>
    __device__ void stage(const Incoming<T, K, S>& x, int count, int64_t n, float bias, bool softplus) {
        constexpr int kChannels = Block<K, S>::kChannels;
        const int channel = static_cast<int>(threadIdx.x) % kChannels,
                  first = static_cast<int>(threadIdx.x) / kChannels;
        float dt[Block<K, S>::kPairs];
        steps_of<K, S>(dt, x.delta, bias, softplus, count);
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i)
            step[first + i * S][channel] = {dt[i], dt[i] * to_float(x.u.at[i])};
        x.B.store(&B[0][0], n);
        if constexpr (kY) x.C.store(&C[0][0], n);
    }
};

// N tokens of a staged tile in registers. Shared memory is read for the next ones before this group's y is
// written there: the compiler cannot know that the two are apart, and would wait for each token.
template <bool kY, int K, int S, int N>
struct Group {
    float2 step[N];
    float B[N][K], C[N][K], decay[N][K];

    __device__ void load(const Shared<K, S>& m, int t, int channel, int part) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            step[i] = m.step[t + i][channel];
            load_row(B[i], &m.B[t + i][part * K]);
            if constexpr (kY) load_row(C[i], &m.C[t + i][part * K]);
        }
    }
    __device__ void decays(int i, const float (&A)[K]) {
#pragma unroll
        for (int k = 0; k < K; ++k) decay[i][k] = exp2_fast(step[i].x * A[k]);
    }
    // h <- exp(dt A) h + dt u B. Returns sum C h.
    __device__ float advance(int i, float (&h)[K], float& sum) const {
        float y = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            h[k] = fmaf(decay[i][k], h[k], step[i].y * B[i][k]);
            if constexpr (kY) y = fmaf(C[i][k], h[k], y);
        }
        if constexpr (!kY) sum += step[i].x;
        return y;
    }
};

// Three groups are under way: one is read, one waits for its exponentials, one goes through the recurrence.
template <bool kY, int K, int S>
__device__ inline void walk_tile(Shared<K, S>& m, int channel, int part, const float (&A)[K], float (&h)[K],
                                 float& sum) {
    constexpr int N = 2;
    Group<kY, K, S, N> now, next, later;
    now.load(m, 0, channel, part);
    next.load(m, N, channel, part);
#pragma unroll
    for (int i = 0; i < N; ++i) now.decays(i, A);
#pragma unroll
    for (int t = 0; t < kTile; t += N) {
        if (t + 2 * N < kTile) later.load(m, t + 2 * N, channel, part);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (t + N < kTile) next.decays(i, A);
            const float y = now.advance(i, h, sum);
            if constexpr (kY) m.y[t + i][threadIdx.x] = y;
        }
        now = next;
        next = later;
    }
}

template <class T, int K, int S>
__device__ inline void finish(const ScanParams<T>& p, const Shared<K, S>& m, const PairTile<T, K, S>& u,
                              const PairTile<T, K, S>& z, int64_t t0, int count, int64_t d0, float D) {
    constexpr int kChannels = Block<K, S>::kChannels;
    const int channel = static_cast<int>(threadIdx.x) % kChannels,
              first = static_cast<int>(threadIdx.x) / kChannels;
    if (d0 + channel >= p.u.shape[1]) return;
    float y[Block<K, S>::kPairs];
#pragma unroll
    for (int i = 0; i < Block<K, S>::kPairs; ++i) {
        y[i] = D * to_float(u.at[i]);
#pragma unroll
        for (int j = 0; j < S; j += 4) {
            const Pack<float, 4> part = load_pack<4>(&m.y[first + i * S][channel * S + j]);
            y[i] += (part.at[0] + part.at[1]) + (part.at[2] + part.at[3]);
        }
    }
    if (p.z.data != nullptr) {
#pragma unroll
        for (int i = 0; i < Block<K, S>::kPairs; ++i) y[i] *= silu_fast(to_float(z.at[i]));
    }
    T* to = p.y.data + (t0 + first) * p.y.stride + d0 + channel;
    const int64_t apart = S * p.y.stride;
#pragma unroll
    for (int i = 0; i < Block<K, S>::kPairs; ++i, to += apart)
        if (first + i * S < count) *to = from_float<T>(y[i]);
}

template <class T, int K, int S, bool kY>
__global__ void __launch_bounds__(kThreads, S <= 8 ? 4 : 2) Scan(const __grid_constant__ ScanParams<T> p) {
    constexpr int kChannels = Block<K, S>::kChannels;
    __shared__ alignas(16) Shared<K, S> m;
    const auto span = p.segments.at(blockIdx.x / p.d_blocks);
    if (p.ends != nullptr && span.last) return;  // nobody asks for it
    const int64_t d = p.A.shape[0], n = p.A.shape[1], d0 = blockIdx.x % p.d_blocks * kChannels;
    const int channel = static_cast<int>(threadIdx.x) / S, part = static_cast<int>(threadIdx.x) % S;
    const int64_t pair_channel = d0 + static_cast<int>(threadIdx.x) % kChannels;
    const float bias = p.bias != nullptr && pair_channel < d ? p.bias[pair_channel] : 0.0f,
                D = p.D != nullptr && pair_channel < d ? p.D[pair_channel] : 0.0f;
    float A[K], h[K], sum = 0.0f;
    load_states(A, p.A.data + (d0 + channel) * (p.A.stride - n), d0 + channel, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) A[k] *= kLog2E;
    const int64_t row = p.segments.split ? span.index : span.sequence;
    load_states(h, p.entering != nullptr ? p.entering + row * d * n : nullptr, d0 + channel, d, n, part);
    const bool aligned = p.chunk % kTile == 0;
    Incoming<T, K, S> x;
    if (span.begin < span.end) x.template load<kY>(p, span.begin, span.end, d0);
    for (int64_t t0 = span.begin; t0 < span.end; t0 += kTile) {
        const int count = static_cast<int>(span.end - t0 < kTile ? span.end - t0 : kTile);
        m.template stage<T, kY>(x, count, n, bias, p.softplus);
        __syncthreads();
        const PairTile<T, K, S> u = x.u, z = x.z;
        x.template load<kY>(p, t0 + kTile < span.end ? t0 + kTile : t0, span.end, d0);
        const auto save = [&](int t) {
            const int64_t at = t0 + t - span.start;
            if (p.chunk_states != nullptr && t < count && at % p.chunk == 0)
                store_states(
                    p.chunk_states + (p.first_chunk.first.offset(span.sequence) + at / p.chunk) * d * n, h,
                    d0 + channel, d, n, part);
        };
        if (aligned || p.chunk_states == nullptr) {
            save(0);
            walk_tile<kY>(m, channel, part, A, h, sum);
        } else {
#pragma unroll 1
            for (int t = 0; t < kTile; ++t) {
                save(t);
                Group<kY, K, S, 1> one;
                one.load(m, t, channel, part);
                one.decays(0, A);
                const float y = one.advance(0, h, sum);
                if constexpr (kY) m.y[t][threadIdx.x] = y;
            }
        }
        __syncthreads();
        if constexpr (kY) finish(p, m, u, z, t0, count, d0, D);
    }
    if (p.final_state != nullptr && span.last)
        store_states(p.final_state + span.sequence * d * n, h, d0 + channel, d, n, part);
    if (p.ends != nullptr) {
        store_states(p.ends + span.index * d * n, h, d0 + channel, d, n, part);
        if (part == 0 && d0 + channel < d) p.sums[span.index * d + d0 + channel] = sum;
    }
}

template <bool kReverse>
__global__ void __launch_bounds__(kThreads) Combine(const __grid_constant__ CombineParams p) {
    const int64_t dn = p.d * p.n, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= dn * p.segments.sequences.count) return;
    const int64_t sequence = i / dn, j = i % dn, channel = j / p.n;
    const float A = p.A[channel * p.a_stride + j % p.n] * kLog2E;
    const int64_t low = p.segments.first.offset(sequence), high = p.segments.first.offset(sequence + 1);
    float carry = p.start != nullptr ? p.start[i] : 0.0f;
#pragma unroll 4
    for (int64_t k = low; k < high; ++k) {
        const int64_t segment = kReverse ? high - 1 - (k - low) : k;
        const bool needed = k + 1 < high;  // the last one's end was not computed
        const float end = needed ? p.ends[segment * dn + j] : 0.0f,
                    sum = needed ? p.sums[segment * p.d + channel] : 0.0f;
        p.ends[segment * dn + j] = carry;
        carry = fmaf(exp2_fast(A * sum), carry, end);
    }
}

// kLanes lanes share a channel of a sequence.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    Step(View<const T, 2> u, View<const T, 2> z, View<const float, 2> delta, View<const float, 2> A,
         View<const float, 2> B, View<const float, 2> C, const float* D, const float* bias, bool softplus,
         View<float, 3> state, const int32_t* slots, View<T, 2> y) {
    const int64_t d = u.shape[1], n = A.shape[1];
    const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const bool mine = pair < u.shape[0] * d;
    const int64_t s = mine ? pair / d : 0, c = mine ? pair % d : 0;
    const float x = to_float(u.data[s * u.stride + c]);
    const float dt = step_of(delta.data[s * delta.stride + c], bias != nullptr ? bias[c] : 0.0f, softplus);
    float* h = state.data + (slots != nullptr ? slots[s] : s) * state.stride + c * n;
    float sum = 0.0f;
    for (int64_t j = threadIdx.x % kLanes; mine && j < n; j += kLanes) {
        h[j] =
            fmaf(exp2_fast(dt * A.data[c * A.stride + j] * kLog2E), h[j], dt * x * B.data[s * B.stride + j]);
        sum = fmaf(C.data[s * C.stride + j], h[j], sum);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (!mine || threadIdx.x % kLanes != 0) return;
    if (D != nullptr) sum = fmaf(D[c], x, sum);
    if (z.data != nullptr) sum *= silu_fast(to_float(z.data[s * z.stride + c]));
    y.data[s * y.stride + c] = from_float<T>(sum);
}

template <class T>
ScanParams<T> make_params(const SelectiveScanInputs<T>& in) {
    ScanParams<T> p{};
    require_stride(in.u), require_stride(in.z), require_stride(in.delta);
    require_stride(in.B), require_stride(in.C);
    p.u = in.u, p.z = in.z, p.delta = in.delta, p.A = in.A, p.B = in.B, p.C = in.C;
    p.D = in.D.data, p.bias = in.delta_bias.data, p.softplus = in.delta_softplus;
    return p;
}

// Forward, whole: with y (kY) or the states alone.
template <class T, bool kY, int K, int S>
void run_scan(const Exec& ex, const SelectiveScanInputs<T>& in, ScanParams<T> p,
              const SelectiveScanOptions& options) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1], s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    p.d_blocks = (d + Block<K, S>::kChannels - 1) / Block<K, S>::kChannels;
    const SegmentsOnDevice segments(ex, in.cu_seqlens, p.d_blocks,
                                    selective_scan_want(ex, options, p.d_blocks * s, 1, 8));
    const std::vector<int64_t> chunks = selective_scan_first_chunks(in.cu_seqlens, p.chunk);
    const SequencesOnDevice first_chunk(ex, chunks);
    p.segments = segments.get();
    p.first_chunk.first = first_chunk.get();
    const auto blocks = static_cast<unsigned>(segments.count() * p.d_blocks);
    const size_t split = p.segments.split ? static_cast<size_t>(segments.count()) : 0;
    const Scratch<float> ends(ex, split * static_cast<size_t>(d * n)),
        sums(ex, split * static_cast<size_t>(d));
    p.entering = in.initial_state.data;
    if (split > 0) {
        ScanParams<T> local = p;
        local.entering = nullptr, local.chunk_states = nullptr, local.final_state = nullptr;
        local.ends = ends.data(), local.sums = sums.data();
        Scan<T, K, S, false><<<blocks, kThreads, 0, stream_of(ex)>>>(local);
        check_launch("selective_scan");
        selective_scan_combine(
            ex, {p.segments, in.initial_state.data, in.A.data, in.A.stride, d, n, ends.data(), sums.data()},
            false);
        p.entering = ends.data();
    }
    Scan<T, K, S, kY><<<blocks, kThreads, 0, stream_of(ex)>>>(p);
    check_launch("selective_scan");
}

// Few channels: more threads for each, as long as that spares a split in time its second exponentials.
template <class T, bool kY>
void run_scan(const Exec& ex, const SelectiveScanInputs<T>& in, const ScanParams<T>& p,
              const SelectiveScanOptions& options) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1], s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    if (s == 0 || d == 0) return;
    const int64_t multiprocessors = ex.cuda->multiprocessors(), blocks = (d + 31) / 32 * s;
    using TimeParallel = SelectiveScanOptions::TimeParallel;
    if (n <= 16 && options.time_parallel != TimeParallel::always && blocks < 2 * multiprocessors &&
        (options.time_parallel == TimeParallel::never || 20 * blocks >= 9 * multiprocessors))
        return run_scan<T, kY, 2, 8>(ex, in, p, options);
    with_block(n, [&](auto k, auto parts) {
        run_scan<T, kY, decltype(k)::value, decltype(parts)::value>(ex, in, p, options);
    });
}

}  // namespace

void selective_scan_combine(const Exec& ex, const CombineParams& p, bool reverse) {
    const unsigned blocks = blocks_for(p.d * p.n * p.segments.sequences.count, kThreads);
    (reverse ? Combine<true> : Combine<false>)<<<blocks, kThreads, 0, stream_of(ex)>>>(p);
    check_launch("selective_scan");
}

int64_t selective_scan_want(const Exec& ex, const SelectiveScanOptions& options, int64_t blocks,
                            int64_t enough_per_multiprocessor, int64_t want_per_multiprocessor) {
    using TimeParallel = SelectiveScanOptions::TimeParallel;
    if (options.time_parallel == TimeParallel::never) return 0;
    const int64_t multiprocessors = ex.cuda->multiprocessors();
    if (options.time_parallel == TimeParallel::automatic &&
        blocks * 10 >= 9 * enough_per_multiprocessor * multiprocessors)
        return 0;
    return want_per_multiprocessor * multiprocessors;
}

template <class T>
void selective_scan_states(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> states,
                           const SelectiveScanOptions& options) {
    ScanParams<T> p = make_params(in);
    p.chunk = kTile, p.chunk_states = states.data;
    run_scan<T, false>(ex, in, p, options);
}

template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options) {
    ScanParams<T> p = make_params(in);
    require_stride(y);
    p.y = y, p.final_state = final_state.data, p.chunk_states = chunk_states.data, p.chunk = options.chunk;
    run_scan<T, true>(ex, in, p, options);
}

template <class T>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state,
                         View<T, 2> y) {
    const int64_t pairs = in.u.shape[0] * in.u.shape[1];
    if (pairs == 0) return;
    const auto launch = [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        Step<T, kLanes><<<blocks_for(pairs * kLanes, kThreads), kThreads, 0, stream_of(ex)>>>(
            in.u, in.z, in.delta, in.A, in.B, in.C, in.D.data, in.delta_bias.data, in.delta_softplus, state,
            in.slots.data, y);
    };
    if (in.A.shape[1] <= 16) {
        launch(std::integral_constant<int, 16>{});
    } else {
        launch(std::integral_constant<int, kWarp>{});
    }
    check_launch("selective_scan_step");
}

template void selective_scan_states(const Exec&, const SelectiveScanInputs<float>&, View<float, 3>,
                                    const SelectiveScanOptions&);
template void selective_scan_states(const Exec&, const SelectiveScanInputs<bf16>&, View<float, 3>,
                                    const SelectiveScanOptions&);
template void selective_scan(const Exec&, const SelectiveScanInputs<float>&, View<float, 2>, View<float, 3>,
                             View<float, 3>, const SelectiveScanOptions&);
template void selective_scan(const Exec&, const SelectiveScanInputs<bf16>&, View<bf16, 2>, View<float, 3>,
                             View<float, 3>, const SelectiveScanOptions&);
template void selective_scan_step(const Exec&, const SelectiveScanInputs<float>&, View<float, 3>,
                                  View<float, 2>);
template void selective_scan_step(const Exec&, const SelectiveScanInputs<bf16>&, View<float, 3>,
                                  View<bf16, 2>);

}  // namespace ssm::cuda
