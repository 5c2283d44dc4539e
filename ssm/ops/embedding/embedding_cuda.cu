// CUDA kernels of embedding. A warp moves a row by packs of 16 bytes; an id outside the table (which the
// CPU's front refuses, and which only the device sees here) gives a row of NaN.
#include <cub/device/device_radix_sort.cuh>

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
    const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
    if (t >= p.ids.shape[0]) return;
    const int64_t e = p.weight.shape[1], id = p.ids.data[t * p.ids.stride];
    const bool known = id >= 0 && id < p.weight.shape[0];
    const W* row = p.weight.data + (known ? id : 0) * p.weight.stride;
    Y* out = p.y.data + t * p.y.stride;
    for (int64_t j = threadIdx.x % kWarp * N; j < e; j += kWarp * N) {
        const Pack<W, N> w = load_pack<N>(row + j);
        Pack<Y, N> y;
#pragma unroll
        for (int k = 0; k < N; ++k) y.at[k] = from_float<Y>(known ? to_float(w.at[k]) : nanf(""));
        store_pack(out + j, y);
    }
}

// Tokens by id, equal ids in the order of t. The first of a run of equal ids sums the run: fixed order, no
// atomics.
struct BackwardParams {
    const int32_t* ids;     // [t] ascending
    const int32_t* tokens;  // [t]
    int64_t t;
    View<const float, 2> grad_y;
    View<float, 2> grad_weight;
};

__global__ void __launch_bounds__(kThreads) Backward(const __grid_constant__ BackwardParams p) {
    const int64_t first = blockIdx.x;
    const int32_t id = p.ids[first];
    if (id < 0 || id >= p.grad_weight.shape[0] || (first > 0 && p.ids[first - 1] == id)) return;
    for (int64_t j = threadIdx.x; j < p.grad_weight.shape[1]; j += kThreads) {
        float sum = p.grad_weight.data[id * p.grad_weight.stride + j];
        for (int64_t i = first; i < p.t && p.ids[i] == id; ++i)
            sum += p.grad_y.data[p.tokens[i] * p.grad_y.stride + j];
        p.grad_weight.data[id * p.grad_weight.stride + j] = sum;
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
    const unsigned blocks = blocks_for(ids.shape[0], kThreads / kWarp);
    constexpr int64_t kPack = 16 / static_cast<int64_t>(sizeof(W) > sizeof(Y) ? sizeof(W) : sizeof(Y));
    if (weight.shape[1] % kPack == 0 && packable(weight.data, weight.stride, kPack) &&
        packable(y.data, y.stride, kPack)) {
        Forward<W, Y, kPack><<<blocks, kThreads, 0, stream_of(ex)>>>(p);
    } else {
        Forward<W, Y, 1><<<blocks, kThreads, 0, stream_of(ex)>>>(p);
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
    Backward<<<static_cast<unsigned>(t), kThreads, 0, stream_of(ex)>>>(
        {sorted.data(), tokens.data(), t, grad_y, grad_weight});
    check_launch("embedding");
}

template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const float, 2>, View<bf16, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<float, 2>);
template void embedding(const Exec&, View<const int32_t, 1>, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm::cuda
