// CUDA kernels of the selective scan, forward and one step; selective_scan_cuda.cuh says who owns what.
#include "ssm/ops/selective_scan/selective_scan_tile.cuh"

namespace ssm::cuda {
namespace {

template <class T>
struct ScanParams {
    View<const T, 2> u, delta, z;
    View<const float, 2> A, B, C;
    const float* D;
    const float* bias;
    bool softplus;
    Segments segments, first_chunk;  // first_chunk.first: of the sequences' chunks
    int64_t chunk, d_blocks;
    Entering entering;
    View<T, 2> y;
    float* final_state;
    float* chunk_states;
    bool paired, packed, packed_states;  // see Two, RowTile, store_states
    unsigned blocks;
};

// Up to kGroups of the blocks of selective_scan_cuda.cuh are groups of one thread block, blockDim.y of them.
// Equal blocks of a multiprocessor, each by itself, end one after another, the last of them on schedulers
// that have little else to do; groups of one thread block end together (README.md, "Fair groups").
template <int S>
constexpr int kGroups = S <= 8 ? 4 : 2;

// Its warps are of different threadIdx.y, so of every age, and each on a scheduler of its own.
__device__ inline int group_of_warp() {
    const unsigned turned = threadIdx.y + threadIdx.x / kWarp;
    return __shfl_sync(kAllLanes, static_cast<int>(turned % blockDim.y), 0);  // one number to the compiler
}
// Waits for the group's threads.
__device__ inline void group_sync(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kThreads) : "memory");
}

template <class T, int K, int S>
struct Incoming {
    PairTile<T, K, S> u, delta, z;
    RowTile<K, S> B, C;

    template <bool kY>
    __device__ void load(const ScanParams<T>& p, int64_t t0, int count, const Channels<K, S>& c) {
        delta.load(p.delta, t0, count, c);
        u.load(p.u, t0, count, c);
        B.load(p.B, t0, count, p.packed, c.whole);
        if constexpr (kY) {
            z.load(p.z, t0, count, c);
            C.load(p.C, t0, count, p.packed, c.whole);
        }
    }
};

template <class T, int K, int S>
struct Shared {
    using Shape = Block<K, S>;
    // y: sums over a thread's states; by the tensor cores, over all of a channel's (the padding keeps four
    // tokens' rows in different banks).
    static constexpr int kWidth = kTensor<T, K, S> ? Shape::kChannels + 8 : kThreads;
    float2 step[kTile][Shape::kChannels];  // dt, dt u
    float B[kTile][K * S], C[kTile][K * S];
    float y[kTile][kWidth];

    template <bool kY>
    __device__ void stage(const Incoming<T, K, S>& x, int count, int64_t n, float2 bias, bool softplus) {
        float2 dt[Shape::kTwos];
        steps_of(dt, x.delta, bias, softplus, count);
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) {
            const float2 u = x.u.floats(i);
            store_pack(&step[Shape::token(i)][Shape::channel()].x,
                       Pack<float, 4>{{dt[i].x, dt[i].x * u.x, dt[i].y, dt[i].y * u.y}});
        }
        x.B.store(&B[0][0], n);
        if constexpr (kY) x.C.store(&C[0][0], n);
    }
    // Of token(i), for the thread's two channels.
    __device__ float2 sum(int i) const {
        const int t = Shape::token(i), channel = Shape::channel();
        if constexpr (kTensor<T, K, S>) {
            const Pack<float, 2> v = load_pack<2>(&y[t][channel]);
            return {v.at[0], v.at[1]};
        } else {
            // Eight lanes read from all banks: every other four begin with the second channel.
            const int swap = channel / 8 % 2;
            float v[2] = {};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int j = 0; j < S; j += 4) {
                    const Pack<float, 4> part = load_pack<4>(&y[t][(channel + (k ^ swap)) * S + j]);
                    v[k] += (part.at[0] + part.at[1]) + (part.at[2] + part.at[3]);
                }
            }
            return swap != 0 ? float2{v[1], v[0]} : float2{v[0], v[1]};
        }
    }
};

// N tokens of a staged tile in registers. Shared memory is read for the next ones before this group's y is
// written there: the compiler cannot know that the two are apart, and would wait for each token. By the
// tensor cores, of two tokens' C a lane has one, the second where its column of the product is odd.
template <class T, bool kY, int K, int S, int N>
struct Group {
    static constexpr bool kProduct = kY && N == 2 && kTensor<T, K, S>;
    float2 step[N];
    float B[N][K], C[N][K], decay[N][K];

    __device__ void load(const Shared<T, K, S>& m, int t, int channel, int part) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            step[i] = m.step[t + i][channel];
            load_row(B[i], &m.B[t + i][part * K]);
            if constexpr (kY && !kProduct) load_row(C[i], &m.C[t + i][part * K]);
        }
        if constexpr (kProduct) load_row(C[0], &m.C[t + channel % 2][part * K]);
    }
    __device__ void decays(int i, const float (&A)[K]) {
#pragma unroll
        for (int k = 0; k < K; ++k) decay[i][k] = exp2_fast(step[i].x * A[k]);
    }
    // h <- exp(dt A) h + dt u B.
    __device__ void advance(int i, float (&h)[K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k) h[k] = fmaf(decay[i][k], h[k], step[i].y * B[i][k]);
    }
    __device__ float read(int i, const float (&h)[K]) const {
        float y = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) y = fmaf(C[i][k], h[k], y);
        return y;
    }
    // C h of both tokens over all parts: rows g of the product are channels at the first, rows g + 8 at the
    // second.
    __device__ float2 product(const float (&first)[K], const float (&second)[K]) const {
        float d[4] = {};
#pragma unroll
        for (int k = 0; k < K; k += 2)
            multiply_tf32(d, first[k], second[k], first[k + 1], second[k + 1], C[0][k], C[0][k + 1]);
        return {d[0], d[3]};
    }
};

// Three groups are under way: one is read, one waits for its exponentials, one goes through the recurrence.
template <class T, bool kY, int K, int S>
__device__ inline void walk_tile(Shared<T, K, S>& m, int channel, int part, const float (&A)[K],
                                 float (&h)[K]) {
    constexpr int N = 2;
    using G = Group<T, kY, K, S, N>;
    G now, next, later;
    float2 before{};  // y of the group before, where every other group stores
    now.load(m, 0, channel, part);
    next.load(m, N, channel, part);
#pragma unroll
    for (int i = 0; i < N; ++i) now.decays(i, A);
#pragma unroll
    for (int t = 0; t < kTile; t += N) {
        float first[K];
        if (t + 2 * N < kTile) later.load(m, t + 2 * N, channel, part);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (t + N < kTile) next.decays(i, A);
            now.advance(i, h);
            if constexpr (kY && !G::kProduct) m.y[t + i][threadIdx.x] = now.read(i, h);
            if (i == 0) {
#pragma unroll
                for (int k = 0; k < K; ++k) first[k] = h[k];
            }
        }
        if constexpr (G::kProduct) {
            const float2 y = now.product(first, h);
            if (t % 4 == 2) {
                const float2 mine = part >= 2 ? y : before;
                m.y[t - 2 + part][channel] = part % 2 == 0 ? mine.x : mine.y;
            }
            before = y;
        }
        now = next;
        next = later;
    }
}

// Token by token, where a state is saved inside of a tile.
template <class T, bool kY, int K, int S, class Save>
__device__ inline void walk_tokens(Shared<T, K, S>& m, int channel, int part, const float (&A)[K],
                                   float (&h)[K], const Save& save) {
#pragma unroll 1
    for (int t = 0; t < kTile; ++t) {
        save(t, 1);
        Group<T, kY, K, S, 1> one;
        one.load(m, t, channel, part);
        one.decays(0, A);
        one.advance(0, h);
        if constexpr (!kY) continue;
        float y = one.read(0, h);
        if constexpr (kTensor<T, K, S>) {
#pragma unroll
            for (int offset = S / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(kAllLanes, y, offset);
            if (part == 0) m.y[t][channel] = y;
        } else {
            m.y[t][threadIdx.x] = y;
        }
    }
}

template <class T, int K, int S>
__device__ inline void finish(const ScanParams<T>& p, const Shared<T, K, S>& m, const PairTile<T, K, S>& u,
                              const PairTile<T, K, S>& z, int64_t t0, int count, const Channels<K, S>& c,
                              float2 D) {
    using Shape = Block<K, S>;
    const int left = c.whole ? 2 : static_cast<int>(p.u.shape[1] - c.d0) - Shape::channel();
    if (left <= 0) return;
    float2 y[Shape::kTwos];
#pragma unroll
    for (int i = 0; i < Shape::kTwos; ++i) {
        const float2 v = u.floats(i);
        y[i] = m.sum(i);
        y[i] = {fmaf(D.x, v.x, y[i].x), fmaf(D.y, v.y, y[i].y)};
    }
    if (c.whole || p.z.data != nullptr) {
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) {
            const float2 v = silu_fast(z.floats(i));
            y[i] = {y[i].x * v.x, y[i].y * v.y};
        }
    }
    T* const row = p.y.data + t0 * p.y.stride + c.d0;
    const int stride = static_cast<int>(p.y.stride);
    if (c.whole || (p.paired && count >= kTile)) {
        T* to = row + c.offset(stride);
        const int64_t apart = Shape::kApart * p.y.stride;
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i, to += apart) *reinterpret_cast<Two<T>*>(to) = two_of<T>(y[i]);
    } else {
#pragma unroll
        for (int i = 0; i < Shape::kTwos; ++i) {
            if (Shape::token(i) >= count) continue;
            T* const to = row + (Shape::token(i) * stride + Shape::channel());
            to[0] = from_float<T>(y[i].x);
            if (left > 1) to[1] = from_float<T>(y[i].y);
        }
    }
}

// kWhole: every tile has kTile tokens and every block all channels, n is K S, nothing optional is absent,
// rows are aligned and chunks are of whole tiles (run_scan). Then no pair is looked at before it is moved.
// While a tile is walked its successor's inputs are on their way; they are staged in the other of two Shared
// before the y of the walk are read, so that a group meets once a tile. Staged if there is a successor:
// without that branch the compiler moves what uses the inputs up, to the head of the walk, which then waits
// for them.
template <class T, int K, int S, bool kY, bool kWhole>
__global__ void __launch_bounds__(kThreads* kGroups<S>, 1) Scan(const __grid_constant__ ScanParams<T> p) {
    constexpr int kChannels = Block<K, S>::kChannels;
    extern __shared__ uint4 memory[];
    const int group = group_of_warp();
    Shared<T, K, S>* const m = reinterpret_cast<Shared<T, K, S>*>(memory) + 2 * group;
    const unsigned block = blockIdx.x * blockDim.y + static_cast<unsigned>(group);
    if (block >= p.blocks) return;
    const auto d_blocks = static_cast<unsigned>(p.d_blocks);
    const auto span = p.segments.at(block / d_blocks);
    const int64_t d = p.A.shape[0], n = kWhole ? K * S : p.A.shape[1], d0 = block % d_blocks * kChannels;
    const int channel = static_cast<int>(threadIdx.x) / S, part = static_cast<int>(threadIdx.x) % S;
    const float2 bias = two_channels(p.bias, d0 + Block<K, S>::channel(), d),
                 D = two_channels(p.D, d0 + Block<K, S>::channel(), d);
    float A[K], h[K];
    load_states(A, p.A.data + (d0 + channel) * (p.A.stride - n), d0 + channel, d, n, part);
#pragma unroll
    for (int k = 0; k < K; ++k) A[k] *= kLog2E;
    const bool aligned = p.chunk % kTile == 0;
    // The next chunk that begins, and after how many tokens.
    const int64_t before = span.begin - span.start, chunks = (before + p.chunk - 1) / p.chunk;
    int64_t until_chunk = chunks * p.chunk - before;
    float* chunk = p.chunk_states != nullptr
                       ? p.chunk_states + (p.first_chunk.first.offset(span.sequence) + chunks) * d * n
                       : nullptr;
    const Channels<K, S> channels(d0, d, kWhole || p.paired, kWhole);
    const auto tokens = [&](int64_t t0) {
        return kWhole || span.end - t0 >= kTile ? kTile : static_cast<int>(span.end - t0);
    };
    Incoming<T, K, S> x;
    if (span.begin < span.end) x.template load<kY>(p, span.begin, tokens(span.begin), channels);
    enter<T, false>(h, p.entering, p.segments, span, A, d0 + channel, d, n, part);
    const auto stage = [&](Shared<T, K, S>& tile, int64_t t0) {
        tile.template stage<kY>(x, tokens(t0), n, bias, kWhole || p.softplus);
    };
    if (span.begin < span.end) stage(m[0], span.begin);
    group_sync(group);
    int now = 0;
    for (int64_t t0 = span.begin; t0 < span.end; t0 += kTile, now ^= 1) {
        const int count = tokens(t0);
        const PairTile<T, K, S> u = x.u, z = x.z;
        const int64_t next = t0 + kTile < span.end ? t0 + kTile : t0;
        x.template load<kY>(p, next, tokens(next), channels);
        // The chunk's state, where one begins at the tile's token t.
        const auto save = [&](int t, int tokens) {
            if (until_chunk == 0 && t < count) {
                if constexpr (kWhole) {
                    store_row(chunk + (d0 + channel) * n + part * K, h);
                } else {
                    store_states(chunk, h, d0 + channel, d, n, part, p.packed_states);
                }
                chunk += d * n;
                until_chunk = p.chunk;
            }
            until_chunk -= tokens;
        };
        if (kWhole || aligned || p.chunk_states == nullptr) {
            if (p.chunk_states != nullptr) save(0, kTile);
            walk_tile<T, kY>(m[now], channel, part, A, h);
        } else {
            walk_tokens<T, kY>(m[now], channel, part, A, h, save);
        }
        if (next != t0) stage(m[now ^ 1], next);
        group_sync(group);
        if constexpr (kY) finish(p, m[now], u, z, t0, count, channels, D);
    }
    if (p.final_state != nullptr && span.last)
        store_states(p.final_state + span.sequence * d * n, h, d0 + channel, d, n, part);
}

// kLanes lanes share a channel of a sequence.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    Step(View<const T, 2> u, View<const T, 2> z, View<const T, 2> delta, View<const float, 2> A,
         View<const float, 2> B, View<const float, 2> C, const float* D, const float* bias, bool softplus,
         View<float, 3> state, const int32_t* slots, View<T, 2> y) {
    const int64_t d = u.shape[1], n = A.shape[1];
    const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const bool mine = pair < u.shape[0] * d;
    const int64_t s = mine ? pair / d : 0, c = mine ? pair % d : 0;
    const float x = to_float(u.data[s * u.stride + c]);
    const float dt =
        step_of(to_float(delta.data[s * delta.stride + c]), bias != nullptr ? bias[c] : 0.0f, softplus);
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
    p.paired = paired(in.u) && paired(in.z) && paired(in.delta);
    p.packed = packed_rows(in.B) && packed_rows(in.C);
    return p;
}

// As many groups a thread block as a multiprocessor gets blocks, up to kGroups; `bytes` of shared memory
// each.
template <int S, class T>
void launch_groups(const Exec& ex, void (*kernel)(ScanParams<T>), const ScanParams<T>& p, size_t bytes) {
    const auto multiprocessors = static_cast<unsigned>(ex.cuda->multiprocessors());
    const unsigned groups =
        std::clamp((p.blocks + multiprocessors - 1) / multiprocessors, 1u, 0u + kGroups<S>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes * groups)),
          "selective_scan");
    kernel<<<(p.blocks + groups - 1) / groups, dim3(kThreads, groups), bytes * groups, stream_of(ex)>>>(p);
    check_launch("selective_scan");
}

// Forward, whole: with y (kY) or the states alone.
template <class T, bool kY, int K, int S>
void run_scan(const Exec& ex, const SelectiveScanInputs<T>& in, ScanParams<T> p,
              const SelectiveScanOptions& options) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1], s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    p.d_blocks = (d + Block<K, S>::kChannels - 1) / Block<K, S>::kChannels;
    const SegmentsOnDevice segments(ex, in.cu_seqlens, p.d_blocks,
                                    selective_scan_want(ex, options, p.d_blocks * s, 4));
    const std::vector<int64_t> chunks = selective_scan_first_chunks(in.cu_seqlens, p.chunk);
    const SequencesOnDevice first_chunk(ex, chunks);
    p.segments = segments.get();
    p.first_chunk.first = first_chunk.get();
    p.blocks = static_cast<unsigned>(segments.count() * p.d_blocks);
    const size_t split = p.segments.split ? static_cast<size_t>(segments.count()) : 0;
    const Scratch<float> ends(ex, split * static_cast<size_t>(d * n)),
        sums(ex, split * static_cast<size_t>(d));
    p.entering = {in.initial_state.data, ends.data(), sums.data(), p.softplus};
    if (split > 0) {
        selective_scan_reach<T>(ex,
                                {in.u,
                                 {},
                                 in.delta,
                                 in.A,
                                 in.B,
                                 p.bias,
                                 p.softplus,
                                 p.paired,
                                 p.packed,
                                 p.segments,
                                 0,
                                 ends.data(),
                                 sums.data()},
                                false);
    }
    const bool whole = whole_tiles<K, S>(in.A, in.cu_seqlens) && p.paired && p.packed &&
                       in.z.data != nullptr && p.softplus &&
                       (p.chunk_states == nullptr || (p.packed_states && p.chunk % kTile == 0));
    constexpr bool kWhole = kY && S == 4;
    auto* const kernel = whole ? Scan<T, K, S, kY, kWhole> : Scan<T, K, S, kY, false>;
    launch_groups<S>(ex, kernel, p, 2 * sizeof(Shared<T, K, S>));
}

// Few channels, and time must not be split: more threads for each.
template <class T, bool kY>
void run_scan(const Exec& ex, const SelectiveScanInputs<T>& in, const ScanParams<T>& p,
              const SelectiveScanOptions& options) {
    const int64_t d = in.u.shape[1], n = in.A.shape[1], s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    if (s == 0 || d == 0) return;
    const int64_t multiprocessors = ex.cuda->multiprocessors(), blocks = (d + 31) / 32 * s;
    using TimeParallel = SelectiveScanOptions::TimeParallel;
    if (n <= 16 && options.time_parallel == TimeParallel::never && blocks < 2 * multiprocessors)
        return run_scan<T, kY, 2, 8>(ex, in, p, options);
    with_block(n, [&](auto k, auto parts) {
        run_scan<T, kY, decltype(k)::value, decltype(parts)::value>(ex, in, p, options);
    });
}

}  // namespace

int64_t selective_scan_want(const Exec& ex, const SelectiveScanOptions& options, int64_t blocks,
                            int64_t per_multiprocessor) {
    using TimeParallel = SelectiveScanOptions::TimeParallel;
    if (options.time_parallel == TimeParallel::never) return 0;
    const int64_t want = per_multiprocessor * ex.cuda->multiprocessors();
    if (options.time_parallel == TimeParallel::automatic && blocks * 20 >= 9 * want) return 0;
    return want;
}

template <class T>
void selective_scan_states(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> states,
                           const SelectiveScanOptions& options) {
    ScanParams<T> p = make_params(in);
    p.chunk = kTile, p.chunk_states = states.data;
    p.packed_states = packed_states(states.data, in.A.shape[1]);
    run_scan<T, false>(ex, in, p, options);
}

template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options) {
    ScanParams<T> p = make_params(in);
    require_stride(y);
    p.y = y, p.final_state = final_state.data, p.chunk_states = chunk_states.data, p.chunk = options.chunk;
    p.paired = p.paired && paired(y);
    p.packed_states = packed_states(chunk_states.data, in.A.shape[1]);
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
