// Tiles of the CUDA kernels of ssd: how time is cut into 64 tokens or fewer, tiles of them in shared memory,
// and what their time steps come to. Private.
#pragma once

#include "ssm/core/cuda/async_copies.cuh"
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/sequences.cuh"
#include "ssm/ops/ssd/ssd_fragments.cuh"
#include "ssm/ops/ssd/ssd_impl.h"

namespace ssm::cuda {

constexpr int kQ = 64;   // tokens of a tile
constexpr int kP = 64;   // elements of a head in a tile; a wider head is several tiles
constexpr int kPad = 8;  // behind each row in shared memory: no two rows of a fragment in one bank
constexpr int kLdP = kP + kPad, kLdQ = kQ + kPad;
constexpr int kBand =
    128;  // columns of a state that a block has; a wider state's bands come one after another

// ---- tiles
// kRows x kColumns from rows `stride` apart; zero from `rows` and `columns` on. `packed`: rows are aligned to
// 16 bytes and `columns` is a multiple of what 16 bytes hold; then by asynchronous copies: wait_copies() and
// a barrier before use.
template <int kRows, int kColumns, int kThreads, class T>
__device__ inline void copy_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    constexpr int kLd = kColumns + kPad, kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
    constexpr int kApart = kThreads / kPacks;  // rows between two packs of a thread
    static_assert(kThreads % kPacks == 0 && kRows % kApart == 0);
    if (packed) {
        const int row = static_cast<int>(threadIdx.x) / kPacks,
                  column = static_cast<int>(threadIdx.x) % kPacks * kPack;
        const T* source = from + row * stride + column;
        T* const target = to + row * kLd + column;
        const int inside = column < columns ? rows - row : 0;
#pragma unroll
        for (int k = 0; k < kRows; k += kApart, source += kApart * stride)
            copy16(target + k * kLd, k < inside ? source : from, k < inside);
    } else {
        for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            const bool inside = row < rows && column < columns;
            to[row * kLd + column] = inside ? from[row * stride + column] : from_float<T>(0.0f);
        }
    }
}

// How sequences are cut: into chunks of `chunk` tokens, these into tiles of kQ, the last of each shorter.
struct Tiling {
    Sequences sequences, tiles, chunks;  // the first token, tile and chunk of each sequence
    int64_t chunk, tiles_per_chunk;
};
struct Tile {
    int64_t begin;
    int length;
};
// The k-th tile of sequence s.
__device__ inline Tile tile_at(const Tiling& t, int64_t s, int64_t k) {
    const int64_t chunk_begin = t.sequences.offset(s) + k / t.tiles_per_chunk * t.chunk,
                  begin = chunk_begin + k % t.tiles_per_chunk * kQ,
                  end = min(t.sequences.offset(s + 1), chunk_begin + t.chunk);
    return {begin, static_cast<int>(min(end - begin, static_cast<int64_t>(kQ)))};
}
// The sequence that tile (or chunk) i is of, given the first ones of each sequence.
__device__ inline int64_t sequence_of(const Sequences& first, int64_t i) {
    int64_t low = 0, high = first.count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first.offset(middle) <= i ? low : high) = middle;
    }
    return low;
}
__device__ inline Tile tile_at(const Tiling& t, int64_t tile) {
    const int64_t s = sequence_of(t.tiles, tile);
    return tile_at(t, s, tile - t.tiles.offset(s));
}

// One tile of a head's elements: p0 .. p0 + columns of head h.
struct Part {
    int64_t h, p0;
    int columns;
};
__device__ inline Part part_at(int64_t v, int64_t ptiles, int64_t p) {
    if (ptiles == 1) return {v, 0, static_cast<int>(p)};  // no division
    const int64_t p0 = v % ptiles * kP;
    return {v / ptiles, p0, static_cast<int>(min(p - p0, static_cast<int64_t>(kP)))};
}

// What the time steps of a tile and head come to. Tokens behind the tile's end have dt 0 and the last l.
struct alignas(16) Times {
    float dt[kQ], s[kQ], l[kQ];  // s: sums of dt up to and with this token; l = s A log2(e)
    float e[kQ], w[kQ], r[kQ];   // exp(s A); dt r; r = exp(s_q A - s A)
};
// exp(s_i A - s_j A) of l_i - l_j: 2^x, below 2^-126 zero.
__device__ inline float decay_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline void copy_times(Times& to, const Times& from) {
    constexpr int kPacks = sizeof(Times) / 16;
    const int i = threadIdx.x;
    if (i < kPacks) copy16(reinterpret_cast<float4*>(&to) + i, reinterpret_cast<const float4*>(&from) + i);
}

template <class T>
__device__ inline float raw_dt(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return to_float(in.dt.data[t * in.dt.stride + h]) +
           (in.dt_bias.data != nullptr ? in.dt_bias.data[h * in.dt_bias.stride] : 0.0f);
}
__device__ inline float exact_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
template <class T>
__device__ inline float step_of_raw(const SsdInputs<T>& in, float raw) {
    return in.dt_softplus ? fminf(fmaxf(exact_softplus(raw), in.dt_min), in.dt_max) : raw;
}
// Its derivative.
template <class T>
__device__ inline float slope_of_raw(const SsdInputs<T>& in, float raw) {
    const float soft = exact_softplus(raw);
    const bool inside = soft >= in.dt_min && soft <= in.dt_max;
    return !in.dt_softplus ? 1.0f : inside ? 1.0f / (1.0f + expf(-raw)) : 0.0f;
}
template <class T>
__device__ inline float step_size(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return step_of_raw(in, raw_dt(in, t, h));
}

// D of a part's elements, 0 where it is absent; by asynchronous copies of kP threads from `first` on.
__device__ inline void copy_D(float* to, const View<const float, 2>& D, const Part& part, int first) {
    const int j = static_cast<int>(threadIdx.x) - first;
    if (j < 0 || j >= kP) return;
    const bool given = D.data != nullptr && j < part.columns;
    const float* from = given ? D.data + part.h * D.stride + (D.shape[1] == 1 ? 0 : part.p0 + j) : nullptr;
    if (!given) {
        to[j] = 0.0f;
        return;
    }
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to + j))),
                 "l"(from)
                 : "memory");
}

// f.v[0 .. inside) to to[0 .. inside). `packed`: four lie in one aligned word.
template <class T>
__device__ inline void give_four(T* to, const Four& f, int inside, bool set, bool packed) {
    if (packed && inside >= 4) {
        Pack<T, 4> v{};
        if (!set) v = load_pack<4>(to);
#pragma unroll
        for (int k = 0; k < 4; ++k) v.at[k] = from_float<T>(set ? f.v[k] : to_float(v.at[k]) + f.v[k]);
        store_pack(to, v);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (k < inside) to[k] = from_float<T>(set ? f.v[k] : to_float(to[k]) + f.v[k]);
    }
}

// ---- host
// Whether rows of [t a b] can be loaded in packs of 16 bytes.
template <class T, size_t R>
bool packed16(const T* data, int64_t stride, const std::array<int64_t, R>& shape) {
    const int64_t n = 16 / static_cast<int64_t>(sizeof(T));
    return packable(data, stride, n) && shape[R - 1] % n == 0;
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Makes a Tiling; must live until the kernels are launched.
class TilingOnDevice {
public:
    TilingOnDevice(const Exec& ex, CuSeqlens cu_seqlens, int64_t chunk)
        : chunk_(std::min(chunk, std::max<int64_t>(cu_seqlens.back(), 1))),
          tiles_(first(cu_seqlens, chunk_, true)),
          chunks_(first(cu_seqlens, chunk_, false)),
          sequences_(ex, cu_seqlens),
          tiles_there_(ex, tiles_),
          chunks_there_(ex, chunks_) {}
    Tiling get() const {
        return {sequences_.get(), tiles_there_.get(), chunks_there_.get(), chunk_, tiles_of(chunk_, kQ)};
    }
    int64_t tiles() const { return tiles_.back(); }
    int64_t chunks() const { return chunks_.back(); }

private:
    static std::vector<int64_t> first(CuSeqlens cu_seqlens, int64_t chunk, bool tiles) {
        std::vector<int64_t> r{0};
        for (size_t s = 1; s < cu_seqlens.size(); ++s) {
            const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1], whole = length / chunk;
            const int64_t rest = length % chunk;
            r.push_back(r.back() + (tiles ? whole * tiles_of(chunk, kQ) + tiles_of(rest, kQ)
                                          : whole + (rest > 0 ? 1 : 0)));
        }
        return r;
    }
    int64_t chunk_;
    std::vector<int64_t> tiles_, chunks_;
    SequencesOnDevice sequences_, tiles_there_, chunks_there_;
};

// Into how many slices to cut `parts` for each of `blocks` blocks, of which `slots` run at once: a block
// costs as much as two parts.
inline int64_t slices_for(int64_t blocks, int64_t parts, int64_t slots) {
    int64_t best = 1, least = -1;
    for (int64_t slices = 1; slices <= parts; ++slices) {
        const int64_t cost = tiles_of(blocks * slices, slots) * (tiles_of(parts, slices) + 2);
        if (least < 0 || cost < least) {
            best = slices;
            least = cost;
        }
    }
    return best;
}

// Dynamic shared memory beyond 48 KB has to be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, std::string_view op) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          op);
}

// A state's columns, of rows that lie apart as before, from n0 on.
template <class T, int R>
View<T, R> from_column(View<T, R> v, int64_t n0) {
    if (v.data != nullptr) v.data += n0;
    return v;
}

}  // namespace ssm::cuda
