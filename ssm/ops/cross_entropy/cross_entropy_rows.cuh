// The passes over rows of logits on a GPU: the loss of each row and, if asked, its gradient in its place. A
// short row has a small block, a row that fits a multiprocessor's shared memory is read from memory once, a
// longer one twice. Included by cross_entropy_cuda.cu only.
#pragma once

#include <type_traits>

#include "ssm/core/cuda/bulk.cuh"
#include "ssm/core/cuda/numbers.cuh"

namespace ssm::cuda {
namespace {

constexpr int kPack = 4, kLoads = 4;
constexpr int kThreadsShort = 128, kThreadsLong = 1024;
constexpr int64_t kShortRow = 4096;

struct Params {
    int64_t rows, v, stride;  // of logits; rows are aligned to packs
    float* logits;            // [rows v]; the gradients take their place
    const int32_t* targets;   // [rows]
    const float* grad_nll;    // [rows]
    float* nll;               // [rows]
};

constexpr float kNone = -INFINITY;

// The largest of some numbers and the sum of e^(x - largest).
struct Sum {
    float m = kNone, s = 0.0f;
};
// What a maximum is subtracted as: -inf - -inf would be NaN.
__device__ inline float base_of(float m) { return m == kNone ? 0.0f : m; }

// a's sum below the maximum m >= a.m. Of nothing but -inf it is 0 (or NaN, which stays).
__device__ inline Sum merge(const Sum& a, float m) { return {m, a.m == kNone ? a.s : a.s * __expf(a.m - m)}; }

template <int Packs>
__device__ inline void add(Sum& sum, const Pack<float, kPack> (&x)[Packs]) {
    float m = sum.m;
#pragma unroll
    for (int u = 0; u < Packs; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) m = fmaxf(m, x[u].at[k]);
    }
    if (m != sum.m) sum = merge(sum, m);
    const float base = base_of(m);
#pragma unroll
    for (int u = 0; u < Packs; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum.s += __expf(x[u].at[k] - base);
    }
}

// Over `Threads` threads, in every one of them, in a fixed order; they meet at the block's barrier `id`.
template <int Threads>
__device__ inline Sum merge_block(Sum x, float* maxima, float* sums, int id) {
    constexpr int kWarps = Threads / kWarp;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = merge(x, warp_max(x.m));
    x.s = warp_sum(x.s);
    if (lane == 0) maxima[warp] = x.m, sums[warp] = x.s;
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
    x = lane < kWarps ? Sum{maxima[lane], sums[lane]} : Sum{};
    x = merge(x, warp_max(x.m));
    x.s = warp_sum(x.s);
    return x;
}

// Logits j .. of a row: past its end -inf.
__device__ inline Pack<float, kPack> load_logits(const float* from, int64_t j, int64_t v) {
    Pack<float, kPack> x{{kNone, kNone, kNone, kNone}};
    if (j < v) x = load_pack<kPack>(from);
    if (j + kPack > v) {
#pragma unroll
        for (int k = 0; k < kPack; ++k)
            if (j + k >= v) x.at[k] = kNone;
    }
    return x;
}

template <int Threads>
__device__ inline Sum sum_row(const float* row, int64_t v) {
    __shared__ float maxima[kWarp], sums[kWarp];
    Sum sum;
    for (int64_t base = threadIdx.x * kPack; base < v; base += Threads * kPack * kLoads) {
        Pack<float, kPack> x[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
            const int64_t j = base + u * Threads * kPack;
            x[u] = load_logits(row + j, j, v);
        }
        add(sum, x);
    }
    return merge_block<Threads>(sum, maxima, sums, 0);
}

// A row's target and what its gradient is made of.
struct RowSlope {
    int64_t target;
    bool counts;
    float m = 0, scale = 0, g = 0;
};

template <class G>
__device__ inline Pack<G, kPack> slopes_of(const Pack<float, kPack>& x, int64_t j, const RowSlope& s) {
    float e[kPack] = {};
    if (s.counts) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) e[k] = __expf(x.at[k] - s.m) * s.scale;
        if (s.target >= j && s.target < j + kPack) {
#pragma unroll
            for (int k = 0; k < kPack; ++k) e[k] -= s.target == j + k ? s.g : 0.0f;
        }
    }
    Pack<G, kPack> y;
#pragma unroll
    for (int k = 0; k < kPack; ++k) y.at[k] = from_float<G>(e[k]);
    return y;
}

__device__ inline RowSlope target_of(const Params& p, int64_t r) {
    const int64_t target = p.targets[r];
    return {target, target >= 0 && target < p.v};
}

// The row's nll, by one thread; its slope. x_target was read before the gradients are written.
__device__ inline void finish_row(const Params& p, int64_t r, const Sum& sum, float x_target, float g,
                                  RowSlope& s) {
    const bool good = fabsf(sum.m) < INFINITY && !isnan(sum.s);
    if (threadIdx.x == 0)
        p.nll[r] = s.target < 0 ? 0.0f : !s.counts || !good ? nanf("") : (sum.m - x_target) + logf(sum.s);
    s.m = sum.m, s.g = g;
    s.scale = !s.counts ? 0.0f : good ? g / sum.s : nanf("");
}

// The gradients of a row over its logits, which those in f32 simply replace. Those in bf16 take the first
// half of the row: what an iteration writes has been read in it or before, but by other threads, so the block
// waits for them. The next logits are read before these gradients are written.
template <class G, int Threads>
__device__ inline void write_slopes(const float* row, G* out, int64_t v, const RowSlope& s) {
    constexpr int kStep = Threads * kPack;
    Pack<float, kPack> x[kLoads], next[kLoads];
    const auto load = [&](Pack<float, kPack>* to, int64_t base) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) to[u] = load_logits(row + base + u * kStep, base + u * kStep, v);
    };
    load(x, threadIdx.x * kPack);
    for (int64_t first = 0; first < v; first += kStep * kLoads) {
        const int64_t base = first + threadIdx.x * kPack;
        if constexpr (sizeof(G) < sizeof(float)) __syncthreads();
        load(next, base + kStep * kLoads);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
            const int64_t j = base + u * kStep;
            if (j < v) store_pack(out + j, slopes_of<G>(x[u], j, s));
            x[u] = next[u];
        }
    }
}

// A block a row. G: the gradients' type; void: nll alone.
template <class G, int Threads>
__global__ void __launch_bounds__(Threads) Rows(const __grid_constant__ Params p) {
    const int64_t r = blockIdx.x;
    float* row = p.logits + r * p.stride;
    RowSlope s = target_of(p, r);
    const float x_target = s.counts ? row[s.target] : 0.0f;
    const Sum sum = sum_row<Threads>(row, p.v);
    finish_row(p, r, sum, x_target, std::is_void_v<G> ? 0.0f : p.grad_nll[r], s);
    if constexpr (!std::is_void_v<G>) write_slopes<G, Threads>(row, reinterpret_cast<G*>(row), p.v, s);
}

// ---- Rows through shared memory ----
//
// A block a multiprocessor goes through its rows. A thread of its own asks for pieces of them, in their
// order, as slots of a ring become free; the others sum up the pieces as they come and, when the row's sum is
// known, read them again, give the slots back, and write the gradients while the next row comes.
constexpr int kReaders = 512, kRingThreads = kReaders + kWarp, kReaderWarps = kReaders / kWarp;
constexpr int kPiece = kReaders * kPack, kSlots = 28;  // 8 KiB each
constexpr int64_t kRingRow = int64_t{kSlots} * kPiece;

struct Ring {
    alignas(128) float pieces[kSlots][kPiece];
    uint64_t full[kSlots], empty[kSlots];                  // mbarriers
    float maxima[2][kReaderWarps], sums[2][kReaderWarps];  // of a row and of the next
};
static_assert(sizeof(Ring) <= 227 * 1024);

// Where in the ring a walk over pieces is, and how often it has come round.
struct Slot {
    int at = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++at == kSlots) at = 0, parity ^= 1u;
    }
};

__device__ inline void fetch_rows(const Params& p, Ring& ring) {
    Slot slot;
    for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
        const float* row = p.logits + r * p.stride;
        for (int64_t j = 0; j < p.v; j += kPiece, slot.next()) {
            const int64_t count = j + kPiece < p.stride ? kPiece : p.stride - j;
            wait_barrier(&ring.empty[slot.at], slot.parity ^ 1u);
            fetch_bulk(ring.pieces[slot.at], row + j, static_cast<uint32_t>(count * 4), &ring.full[slot.at]);
        }
    }
}

__device__ inline void give_back(Ring& ring, const Slot& slot) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive_barrier(&ring.empty[slot.at]);
}

// The same contract as Rows', for rows of up to kRingRow logits.
template <class G>
__global__ void __launch_bounds__(kRingThreads, 1) RingRows(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) std::byte memory[];
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots; ++i)
            init_barrier(&ring.full[i], 1), init_barrier(&ring.empty[i], kReaderWarps);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= kReaders) {
        if (threadIdx.x == kReaders) fetch_rows(p, ring);
        return;
    }
    const int v = static_cast<int>(p.v), mine = static_cast<int>(threadIdx.x) * kPack;
    Slot slot;
    int turn = 0;
    for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x, turn ^= 1) {
        float* row = p.logits + r * p.stride;
        RowSlope s = target_of(p, r);
        const float g = std::is_void_v<G> ? 0.0f : p.grad_nll[r];
        const float x_target = threadIdx.x == 0 && s.counts ? row[s.target] : 0.0f;
        Slot again = slot;
        Sum sum;
        for (int j = mine; j < v + mine; j += kPiece, slot.next()) {
            wait_barrier(&ring.full[slot.at], slot.parity);
            const Pack<float, kPack> x[1] = {load_logits(&ring.pieces[slot.at][mine], j, v)};
            if constexpr (std::is_void_v<G>) give_back(ring, slot);
            add(sum, x);
        }
        sum = merge_block<kReaders>(sum, ring.maxima[turn], ring.sums[turn], 1);
        finish_row(p, r, sum, x_target, g, s);
        if constexpr (!std::is_void_v<G>) {
            for (int j = mine; j < v + mine; j += kPiece, again.next()) {
                const Pack<float, kPack> x = load_logits(&ring.pieces[again.at][mine], j, v);
                give_back(ring, again);
                if (j < v) store_pack(reinterpret_cast<G*>(row) + j, slopes_of<G>(x, j, s));
            }
        }
    }
}

}  // namespace
}  // namespace ssm::cuda
