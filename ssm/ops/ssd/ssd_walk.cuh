// Of ssd on CUDA, forward and backward: the kernels Times (time steps, once for all kernels) and Walk, which
// carries a state over the tiles of a sequence in registers and leaves it in scratch before each tile.
// Private; included once by each .cu.
#pragma once

#include "ssm/ops/ssd/ssd_tile.cuh"

namespace ssm::cuda {
namespace {

constexpr int kTimesThreads = 256, kWalkThreads = 256;

template <class T>
struct TimesParams {
    SsdInputs<T> in;
    Tiling tiling;
    int64_t count;  // tiles heads
    Times* times;   // [tiles heads]
};

// A warp per tile and head; a lane has two tokens.
template <class T>
__global__ void __launch_bounds__(kTimesThreads) MakeTimes(const __grid_constant__ TimesParams<T> a) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kTimesThreads / kWarp) + threadIdx.x / kWarp;
    if (unit >= a.count) return;
    const int64_t heads = a.in.x.shape[1], h = unit % heads;
    const Tile tile = tile_at(a.tiling, unit / heads);
    const int lane = threadIdx.x % kWarp, i = 2 * lane;
    constexpr double kLog2e = 1.4426950408889634;
    const double A = a.in.A.data[h * a.in.A.stride];
    float dt[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) dt[k] = i + k < tile.length ? step_size(a.in, tile.begin + i + k, h) : 0.0f;
    double sum = static_cast<double>(dt[0]) + dt[1];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += other;
    }
    const double sums[2] = {sum - dt[1], sum};
    const float last = static_cast<float>(__shfl_sync(kAllLanes, sum, kWarp - 1) * A);
    Pack<float, 2> steps, s, l, e, w, r;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        steps.at[k] = dt[k];
        s.at[k] = static_cast<float>(sums[k]);
        const float exponent = static_cast<float>(sums[k] * A);
        l.at[k] = static_cast<float>(sums[k] * A * kLog2e);
        e.at[k] = __expf(exponent);
        r.at[k] = __expf(last - exponent);
        w.at[k] = dt[k] * r.at[k];
    }
    Times& to = a.times[unit];
    store_pack(to.dt + i, steps);
    store_pack(to.s + i, s);
    store_pack(to.l + i, l);
    store_pack(to.e + i, e);
    store_pack(to.w + i, w);
    store_pack(to.r + i, r);
}

// Walks of one kind: state = exp(l_q) state + sum_j weight_j rows_j columns_j^T over tiles. Onwards, with
// x, B and w, it is S; backwards, with grad y, C and e, the gradient Z.
template <class T>
struct Walks {
    View<const T, 3> rows, columns;
    bool packed_rows = false, packed_columns = false;
    bool backwards = false, by_chunk = false;  // by_chunk: a walk per chunk, not per sequence
    bool add = false;                          // to `last`
    View<const float, 4> from;  // the state to start with, of each sequence or chunk, or absent
    View<float, 4> saved;       // the state at the begin of each chunk, or absent
    View<float, 4> last;        // the state after the last tile, of each sequence, or absent
    T* states = nullptr;        // [tiles, heads * ptiles, kP, N]: before each tile; zero outside of [p n]
    int64_t count = 0;          // of walks, x heads * ptiles
};
template <class T>
struct WalkParams {
    Tiling tiling;
    const Times* times;
    int64_t heads, ptiles, groups, p, n;
    int64_t columns;  // of the states from where the views begin, n or fewer
    Walks<T> walks[2];
};

// A block has W of the N columns of a state.
template <class T, int W>
struct WalkTile {
    T rows[kQ * kLdP], columns[kQ * (W + kPad)];
    float factors[2 * kQ];  // Times::e, Times::w
};
template <class T, int W>
struct WalkTiles {
    WalkTile<T, W> in[2];
    T stage[sizeof(T) == 2 ? kP * (W + kPad) : 4];
};

// What a block works on, and where it stands: `count` tiles from tile k of sequence s on, or backwards.
template <class T>
struct Course {
    int64_t s, from_row, k, count, step;
    int64_t chunk, chunk_begin, stop;  // the tile's, and its first token; where the sequence ends
    int64_t in_chunk;                  // the tile's index in its chunk
    Part part;
    int j0, columns;        // the block's first column, and how many there are
    const T *rows, *right;  // the part's elements of token 0
    const Times* times;     // of tile k

    __device__ Tile tile(const Tiling& t) const {
        const int64_t begin = chunk_begin + in_chunk * kQ, end = min(stop, chunk_begin + t.chunk);
        return {begin, static_cast<int>(min(end - begin, static_cast<int64_t>(kQ)))};
    }
    __device__ void advance(const Tiling& t, int64_t heads) {
        k += step;
        times += step * heads;
        in_chunk += step;
        if (in_chunk < 0 || in_chunk == t.tiles_per_chunk) {
            in_chunk = in_chunk < 0 ? t.tiles_per_chunk - 1 : 0;
            chunk += step;
            chunk_begin += step * t.chunk;
        }
    }
};
template <class T, int N, int W>
__device__ Course<T> course_of(const WalkParams<T>& a, const Walks<T>& w, int64_t block) {
    const int64_t parts = a.heads * a.ptiles, slice = block % (N / W), unit = block / (N / W),
                  i = unit / parts;
    Course<T> c{};
    c.part = part_at(unit % parts, a.ptiles, a.p);
    c.j0 = static_cast<int>(slice) * W;
    c.columns = static_cast<int>(a.columns) - c.j0;
    c.s = w.by_chunk ? sequence_of(a.tiling.chunks, i) : i;
    c.from_row = i;
    c.count = a.tiling.tiles.offset(c.s + 1) - a.tiling.tiles.offset(c.s);
    if (w.by_chunk) {
        c.k = (i - a.tiling.chunks.offset(c.s)) * a.tiling.tiles_per_chunk;
        c.count = min(c.count - c.k, a.tiling.tiles_per_chunk);
    }
    c.step = w.backwards ? -1 : 1;
    if (w.backwards) c.k += c.count - 1;
    c.chunk = c.k / a.tiling.tiles_per_chunk;
    c.in_chunk = c.k - c.chunk * a.tiling.tiles_per_chunk;
    c.chunk_begin = a.tiling.sequences.offset(c.s) + c.chunk * a.tiling.chunk;
    c.stop = a.tiling.sequences.offset(c.s + 1);
    c.rows = w.rows.data + c.part.h * a.p + c.part.p0;
    c.right = w.columns.data + c.part.h / (a.heads / a.groups) * a.n + c.j0;
    c.times = a.times + (a.tiling.tiles.offset(c.s) + c.k) * a.heads + c.part.h;
    return c;
}

// The warp's block of a state: 16 rows and one half of the block's columns.
__device__ inline int walk_row() { return static_cast<int>(threadIdx.x) / kWarp % 4 * 16; }
__device__ inline int walk_half() { return static_cast<int>(threadIdx.x) / kWarp / 4; }

// f(element, its place in [rows, n] from the block's first column on) for those inside.
template <int W, class F>
__device__ inline void each_of_state(Sum (&S)[W / 32], int rows, int columns, int n, const F& f) {
    const int row = walk_row(), column = walk_half() * (W / 2);
#pragma unroll
    for (int b = 0; b < W / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = row + row_of(e), j = column + 16 * b + column_of(e);
            if (i < rows && j < columns) f(S[b].v[e], i * n + j);
        }
    }
}
// To rows of n of f32, by pairs where they are aligned.
template <int W>
__device__ inline void write_state(float* to, const Sum (&S)[W / 32], int rows, int columns, int n) {
    const int row = walk_row(), column = walk_half() * (W / 2);
    const bool paired = n % 2 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0;
#pragma unroll
    for (int b = 0; b < W / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int i = row + row_of(e), j = column + 16 * b + column_of(e);
            if (i >= rows || j >= columns) continue;
            if (paired) {
                store_pack(to + i * n + j, Pack<float, 2>{{S[b].v[e], S[b].v[e + 1]}});
            } else {
                to[i * n + j] = S[b].v[e];
                if (j + 1 < columns) to[i * n + j + 1] = S[b].v[e + 1];
            }
        }
    }
}
// To rows of N of scratch. bf16: through the warp's own part of `stage`, 16 bytes at a time.
template <class T, int N, int W>
__device__ inline void leave_state(T* to, T* stage, const Sum (&S)[W / 32]) {
    const int row = walk_row(), column = walk_half() * (W / 2);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int b = 0; b < W / 32; ++b) store(to + row * N + column + 16 * b, N, S[b]);
    } else {
        constexpr int kLd = W + kPad, kPacks = W / 16, kApart = kWarp / kPacks;
        T* const own = stage + row * kLd + column;
#pragma unroll
        for (int b = 0; b < W / 32; ++b) store(own + 16 * b, kLd, S[b]);
        __syncwarp();
        const int lane = static_cast<int>(threadIdx.x) % kWarp, r = lane / kPacks, c = lane % kPacks * 8;
        T* const target = to + (row + r) * N + column + c;
#pragma unroll
        for (int k = 0; k < 16; k += kApart)
            store_pack(target + k * N, load_pack<8>(own + (r + k) * kLd + c));
        __syncwarp();
    }
}

template <class T, int W>
__device__ inline void fetch(WalkTile<T, W>& m, const WalkParams<T>& a, const Walks<T>& w,
                             const Course<T>& c) {
    const Tile tile = c.tile(a.tiling);
    copy_tile<kQ, kP, kWalkThreads>(m.rows, c.rows + tile.begin * w.rows.stride, w.rows.stride, tile.length,
                                    c.part.columns, w.packed_rows);
    copy_tile<kQ, W, kWalkThreads>(m.columns, c.right + tile.begin * w.columns.stride, w.columns.stride,
                                   tile.length, c.columns, w.packed_columns);
    const int i = 4 * static_cast<int>(threadIdx.x);
    if (i < 2 * kQ) copy16(m.factors + i, i < kQ ? c.times->e + i : c.times->w + (i - kQ));
}

template <class T, int W>
__device__ inline void advance(Sum (&S)[W / 32], const WalkTile<T, W>& m, const float* weights) {
    const float decay = m.factors[kQ - 1];
#pragma unroll
    for (int b = 0; b < W / 32; ++b) {
#pragma unroll
        for (int e = 0; e < 8; ++e) S[b].v[e] *= decay;
    }
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
        Left<T> rows = left<true>(m.rows, kLdP, walk_row(), k);
        scale_columns(rows, weights + k);
#pragma unroll
        for (int b = 0; b < W / 32; ++b)
            multiply(S[b], rows, right<true>(m.columns, W + kPad, k, walk_half() * (W / 2) + 16 * b));
    }
}

template <class T, int N, int W>
__global__ void __launch_bounds__(kWalkThreads, sizeof(T) == 2 ? 3 : 2)
    Walk(const __grid_constant__ WalkParams<T> a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& m = *reinterpret_cast<WalkTiles<T, W>*>(memory);
    const int64_t first_blocks = a.walks[0].count * (N / W), which = blockIdx.x >= first_blocks ? 1 : 0;
    const Walks<T>& w = a.walks[which];
    Course<T> c = course_of<T, N, W>(a, w, blockIdx.x - which * first_blocks);
    const int64_t offset = (c.part.h * a.p + c.part.p0) * a.n + c.j0, parts = a.heads * a.ptiles;
    const int rows = c.part.columns, n = static_cast<int>(a.n);
    Sum S[W / 32];
    if (w.from.data != nullptr) {
        const float* from = w.from.data + c.from_row * w.from.stride + offset;
        each_of_state<W>(S, rows, c.columns, n, [&](float& v, int at) { v = from[at]; });
    }
    const int64_t updates = w.last.data != nullptr ? c.count : c.count - 1;  // who asks for the last?
    T* state =
        w.states +
        ((a.tiling.tiles.offset(c.s) + c.k) * parts + c.part.h * a.ptiles + c.part.p0 / kP) * (kP * N) + c.j0;
    if (updates > 0) fetch<T, W>(m.in[0], a, w, c);
    for (int64_t i = 0; i < c.count; ++i, state += c.step * parts * (kP * N)) {
        WalkTile<T, W>& now = m.in[i % 2];
        const bool begins_chunk = c.in_chunk == 0;
        const int64_t chunk = c.chunk;
        wait_copies();
        __syncthreads();  // this tile is there, the other one is read
        c.advance(a.tiling, a.heads);
        if (i + 1 < updates) fetch<T, W>(m.in[1 - i % 2], a, w, c);
        leave_state<T, N, W>(state, m.stage, S);
        if (w.saved.data != nullptr && begins_chunk)
            write_state<W>(w.saved.data + (a.tiling.chunks.offset(c.s) + chunk) * w.saved.stride + offset, S,
                           rows, c.columns, n);
        if (i < updates) advance<T, W>(S, now, now.factors + (w.backwards ? 0 : kQ));
    }
    if (w.last.data == nullptr) return;
    float* const to = w.last.data + c.s * w.last.stride + offset;
    if (w.add) {
        each_of_state<W>(S, rows, c.columns, n, [&](float& v, int at) { to[at] += v; });
    } else {
        write_state<W>(to, S, rows, c.columns, n);
    }
}

template <class T>
void make_times(const Exec& ex, const SsdInputs<T>& in, const Tiling& tiling, int64_t tiles, Times* times,
                std::string_view op) {
    const TimesParams<T> p{in, tiling, tiles * in.x.shape[1], times};
    if (p.count == 0) return;
    MakeTimes<T><<<blocks_for(p.count, kTimesThreads / kWarp), kTimesThreads, 0, stream_of(ex)>>>(p);
    check_launch(op);
}

template <class T, int N, int W>
void launch_walk(const Exec& ex, const WalkParams<T>& p, int64_t blocks, std::string_view op) {
    constexpr size_t kBytes = sizeof(WalkTiles<T, W>);
    allow_shared(Walk<T, N, W>, kBytes, op);
    Walk<T, N, W><<<static_cast<unsigned>(blocks), kWalkThreads, kBytes, stream_of(ex)>>>(p);
    check_launch(op);
}
// Few walks: two blocks a state, each with half of the columns.
template <class T, int N>
void walk(const Exec& ex, const WalkParams<T>& p, std::string_view op) {
    const int64_t blocks = p.walks[0].count + p.walks[1].count;
    if (blocks == 0) return;
    if (blocks <= 2 * ex.cuda->multiprocessors()) {
        launch_walk<T, N, N / 2>(ex, p, 2 * blocks, op);
    } else {
        launch_walk<T, N, N>(ex, p, blocks, op);
    }
}

}  // namespace
}  // namespace ssm::cuda
