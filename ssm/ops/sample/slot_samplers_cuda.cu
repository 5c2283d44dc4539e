// CUDA kernel of SlotSamplers: a block chooses the id of one row. What is kept is always a prefix of the ids
// sorted by falling logit, ties by rising id: a boundary, found by histograms from coarse to fine, never a
// sort. Weights are integers, so sums are exact and their order does not matter.
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/sample/sample_impl.h"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp, kBuckets = 2 * kThreads;
constexpr float kBucketsPerUnit = 64.0f, kUnit = 0x1p40f;
constexpr uint64_t kAll = ~uint64_t{0} >> 1;
using Number = unsigned long long;  // what atomicAdd takes

struct Shared {
    Number buckets[kBuckets];
    Number sums[kWarps];
    Number counts[kWarps];
    // What one thread found for all.
    Number left, before, equals_before;
    double threshold;
    int found, id;
};

// Larger floats have larger numbers; +0 and -0 one.
__device__ inline uint32_t rising(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_rising(uint32_t key) {
    return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// A row as the choice sees it: with the repetition penalty.
struct Row {
    const float* logits;
    const uint32_t* seen;
    float penalty;
    int valid;

    __device__ float operator[](int i) const {
        const float x = logits[i];
        if (penalty == 1.0f || (seen[i / 32] >> (i % 32) & 1u) == 0) return x;
        return x > 0.0f ? x / penalty : x * penalty;
    }
};

// Weights relative to the largest logit.
struct Weigher {
    float max, inv_temperature, min_p;

    __device__ Number operator()(float x) const {
        const float e = (x - max) * inv_temperature;
        return e >= -87.0f ? __float2ull_rn(expf(e) * kUnit) : 0;
    }
    __device__ Number kept(float x) const {
        const Number w = (*this)(x);
        return static_cast<float>(w) < min_p * kUnit ? 0 : w;
    }
};
struct Counter {
    __device__ Number operator()(float) const { return 1; }
};

// Kept: what is above `key`, and the first `equals` of those equal to it.
struct Boundary {
    uint32_t key = 0;
    Number equals = kAll;
};

__device__ inline Number warp_total(Number x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}
__device__ inline Number warp_prefix(Number x) {  // inclusive
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const Number other = __shfl_up_sync(kAllLanes, x, offset);
        if (threadIdx.x % kWarp >= offset) x += other;
    }
    return x;
}
__device__ inline Number block_total(Shared& m, Number x) {
    x = warp_total(x);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) m.sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_total(m.sums[threadIdx.x % kWarp]);
}

// The first bucket at which the sum of buckets reaches `target` (> 0): m.found, and what is left of the
// target before it: m.left. None: m.found is -1.
__device__ inline void find_bucket(Shared& m, Number target) {
    const int first = 2 * static_cast<int>(threadIdx.x), warp = threadIdx.x / kWarp;
    const Number a = m.buckets[first], b = m.buckets[first + 1];
    const Number through = warp_prefix(a + b);
    if (threadIdx.x % kWarp == kWarp - 1) m.sums[warp] = through;
    if (threadIdx.x == 0) m.found = -1;
    __syncthreads();
    Number before = through - a - b;
    for (int w = 0; w < warp; ++w) before += m.sums[w];
    if (before < target && before + a + b >= target) {
        const bool second = before + a < target;
        m.found = second ? first + 1 : first;
        m.left = target - before - (second ? a : 0);
    }
    __syncthreads();
}

__device__ inline int coarse_bucket(float x, const Weigher& weigh) {
    return static_cast<int>(
        fminf((weigh.max - x) * weigh.inv_temperature * kBucketsPerUnit, static_cast<float>(kBuckets - 1)));
}

// A histogram of what `within` keeps and `in(key, x)` accepts.
template <class Measure, class In, class Bucket>
__device__ inline void histogram(Shared& m, const Row& row, const Boundary& within, Measure measure, In in,
                                 Bucket bucket) {
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) m.buckets[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.valid; i += kThreads) {
        const float x = row[i];
        const uint32_t key = rising(x);
        if (key > within.key && in(key, x)) atomicAdd(&m.buckets[bucket(key, x)], measure(x));
    }
    if (threadIdx.x == 0 && within.key != 0) {
        const float x = from_rising(within.key);
        if (in(within.key, x)) atomicAdd(&m.buckets[bucket(within.key, x)], within.equals * measure(x));
    }
    __syncthreads();
}

// The smallest prefix inside `within` whose measures reach the target.
template <class Measure>
__device__ inline Boundary select(Shared& m, const Row& row, const Weigher& weigh, const Boundary& within,
                                  Number target, Measure measure) {
    histogram(
        m, row, within, measure, [](uint32_t, float) { return true; },
        [&](uint32_t, float x) { return coarse_bucket(x, weigh); });
    find_bucket(m, target);
    const int coarse = m.found;
    if (coarse < 0) return within;
    target = m.left;
    uint32_t prefix = 0;
    int done = 0;
    for (const int bits : {11, 11, 10}) {
        const int shift = 32 - done - bits;
        const uint32_t mask = (1u << bits) - 1u;
        __syncthreads();
        histogram(
            m, row, within, measure,
            [&](uint32_t key, float x) {
                return coarse_bucket(x, weigh) == coarse && (done == 0 || key >> (32 - done) == prefix);
            },
            [&](uint32_t key, float) { return static_cast<int>(mask - (key >> shift & mask)); });
        find_bucket(m, target);
        target = m.left;
        prefix = prefix << bits | (mask - static_cast<uint32_t>(m.found));
        done += bits;
    }
    __syncthreads();
    const Number each = measure(from_rising(prefix));
    return {prefix, each == 0 ? kAll : (target + each - 1) / each};
}

struct Largest {
    float value;
    int id;  // -1: NaN
};

// The first of the largest logits.
__device__ inline Largest largest(Shared& m, const Row& row) {
    Number best = 0;
    for (int i = threadIdx.x; i < row.valid; i += kThreads) {
        const float x = row[i];
        const Number one =
            isnan(x) ? ~Number{0} : static_cast<Number>(rising(x)) << 32 | ~static_cast<uint32_t>(i);
        best = best > one ? best : one;
    }
    const auto warp_best = [&] {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
            const Number other = __shfl_xor_sync(kAllLanes, best, offset);
            best = best > other ? best : other;
        }
    };
    warp_best();
    if (threadIdx.x % kWarp == 0) m.sums[threadIdx.x / kWarp] = best;
    __syncthreads();
    best = m.sums[threadIdx.x % kWarp];
    warp_best();
    __syncthreads();
    if (best == ~Number{0}) return {0.0f, -1};
    return {from_rising(static_cast<uint32_t>(best >> 32)), static_cast<int>(~static_cast<uint32_t>(best))};
}

// Number `draws` of a seed: splitmix64, as core/random.h.
__device__ inline double uniform(uint64_t seed, uint64_t draws) {
    constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
    uint64_t z = seed + draws * kStep + kStep;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

__device__ inline Number at_most(Number a, Number b) { return a < b ? a : b; }

// One thread: which warp's ids hold the draw.
__device__ inline void find_segment(Shared& m, Number equals, Number each, double u) {
    Number total = 0, left = equals;
    for (int w = 0; w < kWarps; ++w) {
        const Number take = at_most(left, m.counts[w]);
        left -= take;
        total += m.sums[w] + take * each;
    }
    m.threshold = u * static_cast<double>(total);
    Number before = 0;
    left = equals;
    for (int w = 0; w < kWarps; ++w) {
        const Number take = at_most(left, m.counts[w]), sum = m.sums[w] + take * each;
        if (sum > 0) {  // the last one with a weight, should rounding leave none
            m.found = w;
            m.before = before;
            m.equals_before = equals - left;
        }
        left -= take;
        before += sum;
        if (static_cast<double>(before) > m.threshold) break;
    }
}

// The first id, in rising order, at which the sum of kept weights exceeds u times their total.
__device__ inline int draw(Shared& m, const Row& row, const Weigher& weigh, const Boundary& kept, double u) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int each_warp = (row.valid + kThreads - 1) / kThreads * kWarp;
    const int begin = warp * each_warp, end = min(begin + each_warp, row.valid);
    const Number each = kept.key == 0 ? 0 : weigh.kept(from_rising(kept.key));
    Number sum = 0, count = 0;
    for (int i = begin + lane; i < end; i += kWarp) {
        const float x = row[i];
        const uint32_t key = rising(x);
        if (key > kept.key) sum += weigh.kept(x);
        count += key == kept.key ? 1 : 0;
    }
    sum = warp_total(sum), count = warp_total(count);
    if (lane == 0) m.sums[warp] = sum, m.counts[warp] = count;
    __syncthreads();
    if (threadIdx.x == 0) find_segment(m, kept.equals, each, u);
    __syncthreads();
    if (warp == m.found) {
        Number before = m.before, equals = m.equals_before;
        int id = begin;
        for (int base = begin; base < end; base += kWarp) {
            const int i = base + lane;
            const float x = i < end ? row[i] : -INFINITY;
            const uint32_t key = rising(x);
            const unsigned equal = __ballot_sync(kAllLanes, i < end && key == kept.key);
            Number w = 0;
            if (i < end && key > kept.key) w = weigh.kept(x);
            if ((equal >> lane & 1u) != 0 && equals + __popc(equal & ((1u << lane) - 1u)) < kept.equals)
                w = each;
            const Number through = before + warp_prefix(w);
            const unsigned over =
                __ballot_sync(kAllLanes, w > 0 && static_cast<double>(through) > m.threshold);
            const unsigned some = __ballot_sync(kAllLanes, w > 0);
            if (some != 0) id = base + (kWarp - 1 - __clz(static_cast<int>(some)));
            if (over != 0) {
                id = base + __ffs(static_cast<int>(over)) - 1;
                break;
            }
            before = __shfl_sync(kAllLanes, through, kWarp - 1);
            equals += __popc(equal);
        }
        if (lane == 0) m.id = id;
    }
    __syncthreads();
    return m.id;
}

__device__ inline int choose(Shared& m, const Row& row, const SlotSamplers::Slot& o) {
    const Largest best = largest(m, row);
    if (best.id < 0 || isinf(best.value)) return -1;
    if (o.temperature == 0.0f) return best.id;
    const Weigher weigh{best.value, fminf(1.0f / o.temperature, 3.402823466e38f), o.min_p};
    Boundary kept;
    if (o.top_k > 0 && o.top_k < row.valid)
        kept = select(m, row, weigh, kept, static_cast<Number>(o.top_k), Counter{});
    if (o.top_p < 1.0f) {
        Number sum = 0;
        for (int i = threadIdx.x; i < row.valid; i += kThreads) {
            const float x = row[i];
            if (rising(x) > kept.key) sum += weigh(x);
        }
        if (threadIdx.x == 0 && kept.key != 0) sum += kept.equals * weigh(from_rising(kept.key));
        sum = block_total(m, sum);
        const double target = ceil(static_cast<double>(sum) * static_cast<double>(o.top_p));
        kept = select(m, row, weigh, kept, target < 1.0 ? 1 : static_cast<Number>(target), weigh);
    }
    return draw(m, row, weigh, kept, uniform(o.seed, o.draws));
}

__global__ void __launch_bounds__(kThreads) Choose(const __grid_constant__ SampleParams p) {
    __shared__ Shared m;
    const int64_t slot = p.slots != nullptr ? p.slots[blockIdx.x] : blockIdx.x;
    uint32_t* seen = p.seen.data + slot * p.seen.stride;
    int32_t* id = p.ids.data + blockIdx.x * p.ids.stride;
    if (threadIdx.x == 0 && p.seen_before && *id >= 0 && *id < p.valid) seen[*id / 32] |= 1u << (*id % 32);
    __syncthreads();
    const SlotSamplers::Slot o = p.state[slot];
    const Row row{p.logits.data + blockIdx.x * p.logits.stride, seen, o.repetition_penalty,
                  static_cast<int>(p.valid)};
    const int chosen = choose(m, row, o);
    if (threadIdx.x != 0) return;
    *id = chosen;
    if (o.temperature != 0.0f && chosen >= 0) p.state[slot].draws = o.draws + 1;
}

__global__ void Mark(View<const int32_t, 1> ids, View<uint32_t, 1> seen) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= ids.shape[0]) return;
    const int32_t id = ids.data[i * ids.stride];
    atomicOr(seen.data + id / 32, 1u << (id % 32));
}

}  // namespace

void sample(const Exec& ex, const SampleParams& p) {
    Choose<<<static_cast<unsigned>(p.logits.shape[0]), kThreads, 0, stream_of(ex)>>>(p);
    check_launch("sample");
}

void mark_seen(const Exec& ex, View<const int32_t, 1> ids, View<uint32_t, 1> seen) {
    Mark<<<blocks_for(ids.shape[0], 256), 256, 0, stream_of(ex)>>>(ids, seen);
    check_launch("sample");
}

}  // namespace ssm::cuda
