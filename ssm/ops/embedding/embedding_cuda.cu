// CUDA kernels of embedding. A thread moves a pack of 16 bytes of a row; an id outside the table (which the
// CPU's front refuses, and which only the device sees here) gives a row of NaN.
#include <cub/device/device_radix_sort.cuh>

#include <algorithm>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/embedding/embedding_impl.h"

namespace ssm::cuda {
namespace {

constexpr int kThreads = 256;

template <class W, class Y>
struct ForwardParams {
    View<const int32_t, 1> ids;
    View<const W, 2> weight;
    View<Y, 2> y;
};

template <class W, class Y, int N>
__global__ void __launch_bounds__(kThreads) Forward(const __grid_constant__ ForwardParams<W, Y> p) {
    const int64_t t = blockIdx.x, id = p.ids.data[t * p.ids.stride];
    const bool known = id >= 0 && id < p.weight.shape[0];
    const W* row = p.weight.data + (known ? id : 0) * p.weight.stride;
    const int64_t step = int64_t{gridDim.y} * blockDim.x * N;
    for (int64_t j = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N; j < p.weight.shape[1];
         j += step) {
        const Pack<W, N> w = load_pack<N>(row + j);
        Pack<Y, N> y;
#pragma unroll
        for (int k = 0; k < N; ++k) y.at[k] = from_float<Y>(known ? to_float(w.at[k]) : nanf(""));
        store_pack(p.y.data + t * p.y.stride + j, y);
    }
}

// Tokens by id, equal ids in the order of t, cut into segments of kSegment. A block sums the runs of equal
// ids of its segment; a run that lies in it whole is added to its row at once, a part of a longer one waits
// in `parts` [segments 2 e]: 0 what the segment before began, 1 what goes on in the next (or goes through). A
// second pass adds a long run's parts. Fixed order, no atomics; and an id that is most of the text (a blank,
// a comma) is summed by as many blocks as it fills.
constexpr int kSegment = 128;
constexpr int kTogether = 8;  // tokens whose rows are on their way at once

struct BackwardParams {
    const int32_t* ids;     // [t] ascending
    const int32_t* tokens;  // [t]
    int64_t t;
    View<const float, 2> grad_y;
    View<float, 2> grad_weight;
    float* parts;

    __device__ bool known(int32_t id) const { return id >= 0 && id < grad_weight.shape[0]; }
    __device__ float* part(int64_t segment, int side) const {
        return parts + (2 * segment + side) * grad_weight.shape[1];
    }
};

__global__ void __launch_bounds__(kThreads) SumSegments(const __grid_constant__ BackwardParams p) {
    __shared__ int32_t ids[kSegment], tokens[kSegment];
    const int64_t segment = blockIdx.x, begin = segment * kSegment;
    const int count = static_cast<int>(min(static_cast<int64_t>(kSegment), p.t - begin));
    for (int i = threadIdx.x; i < count; i += kThreads) {
        ids[i] = p.ids[begin + i];
        tokens[i] = p.tokens[begin + i];
    }
    __syncthreads();
    const bool from_before = begin > 0 && p.ids[begin - 1] == ids[0];
    const bool goes_on = begin + count < p.t && p.ids[begin + count] == ids[count - 1];
    const auto row = [&](int i) { return ids[i] * p.grad_weight.stride; };
    for (int64_t j = blockIdx.y * kThreads + threadIdx.x; j < p.grad_weight.shape[1];
         j += int64_t{gridDim.y} * kThreads) {
        float sum = 0;
        bool begun = from_before;  // the run of now, before this segment
        for (int first = 0; first < count; first += kTogether) {
            float grad[kTogether], weight[kTogether];
            bool ends[kTogether];  // a run that ends here; its row is read before any other's is written
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                const int i = first + u;
                if (i >= count) continue;
                ends[u] = i + 1 == count ? !goes_on : ids[i + 1] != ids[i];
                grad[u] = p.grad_y.data[tokens[i] * p.grad_y.stride + j];
                if (ends[u] && p.known(ids[i])) weight[u] = p.grad_weight.data[row(i) + j];
            }
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                const int i = first + u;
                if (i >= count) continue;
                sum += grad[u];
                if (!ends[u]) continue;
                if (begun) {
                    p.part(segment, 0)[j] = sum;
                } else if (p.known(ids[i])) {
                    p.grad_weight.data[row(i) + j] = weight[u] + sum;
                }
                begun = false;
                sum = 0;
            }
        }
        if (goes_on) p.part(segment, 1)[j] = sum;
    }
}

// A block for each segment in which a long run begins.
__global__ void __launch_bounds__(kThreads) AddParts(const __grid_constant__ BackwardParams p) {
    const int64_t segment = blockIdx.x, begin = segment * kSegment, end = begin + kSegment;
    if (end >= p.t) return;
    const int32_t id = p.ids[end - 1];
    if (p.ids[end] != id || !p.known(id) || (begin > 0 && p.ids[begin - 1] == id)) return;
    int64_t low = end, high = p.t;  // the first token after the run
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.ids[middle] == id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const int64_t last = (low - 1) / kSegment;  // the segment in which it ends
    for (int64_t j = threadIdx.x; j < p.grad_weight.shape[1]; j += kThreads) {
        float sum = 0;
#pragma unroll 8
        for (int64_t s = segment; s < last; ++s) sum += p.part(s, 1)[j];
        sum += p.part(last, 0)[j];
        p.grad_weight.data[id * p.grad_weight.stride + j] += sum;
    }
}

__global__ void Number(int32_t* tokens, int64_t t) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < t) tokens[i] = static_cast<int32_t>(i);
}

}  // namespace

template <class W, class Y>
void embedding(const Exec& ex, View<const int32_t, 1> ids, View<const W, 2> weight, View<Y, 2> y) {
    if (ids.shape[0] == 0 || weight.shape[1] == 0) return;
    const ForwardParams<W, Y> p{ids, weight, y};
    const auto launch = [&]<int N>() {
        constexpr int64_t kMostParts = 16;  // of a row
        const int64_t packs = (weight.shape[1] + N - 1) / N, warps = (packs + kWarp - 1) / kWarp;
        const auto threads = static_cast<unsigned>(std::min<int64_t>(warps * kWarp, kThreads));
        const dim3 blocks(static_cast<unsigned>(ids.shape[0]),
                          static_cast<unsigned>(std::min((packs + threads - 1) / threads, kMostParts)));
        Forward<W, Y, N><<<blocks, threads, 0, stream_of(ex)>>>(p);
    };
    constexpr int kPack = 16 / static_cast<int>(sizeof(W) > sizeof(Y) ? sizeof(W) : sizeof(Y));
    if (weight.shape[1] % kPack == 0 && packable(weight.data, weight.stride, kPack) &&
        packable(y.data, y.stride, kPack)) {
        launch.template operator()<kPack>();
    } else {
        launch.template operator()<1>();
    }
    check_launch("embedding");
}

void embedding_backward(const Exec& ex, View<const int32_t, 1> ids, View<const float, 2> grad_y,
                        View<float, 2> grad_weight) {
    const int64_t t = ids.shape[0];
    if (t == 0 || grad_y.shape[1] == 0) return;
    const auto count = static_cast<size_t>(t);
    const Scratch<int32_t> numbers(ex, count), sorted(ex, count), tokens(ex, count);
    Number<<<blocks_for(t, kThreads), kThreads, 0, stream_of(ex)>>>(numbers.data(), t);
    check_launch("embedding");
    size_t bytes = 0;
    const auto sort = [&](void* memory) {
        check(cub::DeviceRadixSort::SortPairs(memory, bytes, ids.data, sorted.data(), numbers.data(),
                                              tokens.data(), static_cast<int>(t), 0, 32, stream_of(ex)),
              "embedding");
    };
    sort(nullptr);
    const Scratch<std::byte> memory(ex, bytes);
    sort(memory.data());
    const int64_t segments = (t + kSegment - 1) / kSegment;
    const Scratch<float> parts(ex, static_cast<size_t>(2 * segments * grad_y.shape[1]));
    const BackwardParams p{sorted.data(), tokens.data(), t, grad_y, grad_weight, parts.data()};
    const dim3 grid(static_cast<unsigned>(segments), blocks_for(grad_y.shape[1], kThreads));
    SumSegments<<<grid, kThreads, 0, stream_of(ex)>>>(p);
    check_launch("embedding");
    AddParts<<<static_cast<unsigned>(segments), kThreads, 0, stream_of(ex)>>>(p);
    check_launch("embedding");
}

template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<bf16, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm::cuda
