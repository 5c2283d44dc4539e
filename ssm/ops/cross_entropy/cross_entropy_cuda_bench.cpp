// The head of Mamba-130M: 16384 tokens, e 768, v 50288; tiles of several sizes.
#include "ssm/ops/cross_entropy/cross_entropy.h"

#include "ssm/ops/cross_entropy/cross_entropy_impl.h"
#include "ssm/ops/cross_entropy/cross_entropy_reference.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

struct Head {
    int64_t t, v, e;
    Tensor hidden, weight, targets, nll;

    template <class T>
    static Head make(const benchmark::State& state) {
        const int64_t t = state.range(0), v = state.range(1), e = state.range(2);
        std::vector<int32_t> ids;
        Random random(5);
        for (int64_t i = 0; i < t; ++i) ids.push_back(static_cast<int32_t>(random.integer(0, v - 1)));
        return {t,
                v,
                e,
                large_random<T>({t, e}),
                large_random<T>({v, e}, 0.2f),
                on_device(ids, {t}),
                on_device(nan_vector(t), {t})};
    }
    int64_t tile_bytes(const benchmark::State& state) const { return state.range(3) << 20; }

    // Some tokens against f64, from what is on the GPU.
    void verify(double tolerance) const {
        const auto size = [](int64_t n) { return static_cast<size_t>(n); };
        const Tensor h = hidden.to_host().to(DType::f32), w = weight.to_host().to(DType::f32);
        const auto got = from_device<float>(nll);
        const auto ids = from_device<int32_t>(targets);
        for (const int64_t i : {int64_t{0}, t / 2 + 1, t - 1}) {
            const double expected =
                TokenLoss(h.data<float>() + i * e, w.data<float>(), v, e).nll(ids[size(i)]);
            require_close(static_cast<double>(got[size(i)]), expected, tolerance * expected);
        }
    }
};

template <class T>
void forward(benchmark::State& state) {
    const Head head = Head::make<T>(state);
    const PackedWeight weight(head.weight);
    const auto step = [&](int) {
        cuda::linear_cross_entropy(cuda_exec(), head.hidden, weight, head.targets.view<const int32_t, 1>(),
                                   head.nll.view<float, 1>(), head.tile_bytes(state));
    };
    step(0);
    head.verify(1e-4);
    time_graph(state, 1, step);
    report_rate(state, "FLOP/s", static_cast<double>(2 * head.t * head.v * head.e),
                sizeof(T) == 2 ? kBf16Flops : kF32Flops);
}

// T: of hidden, its gradient and the weight. Beside it the scratch: what the allocator held at most.
template <class T>
void backward(benchmark::State& state, MatmulPrecision precision) {
    Exec ex = cuda_exec();
    ex.allocator = std::make_shared<cuda::DeviceAllocator>(ex.cuda);
    ex.matmul = precision;
    const bool round = precision == MatmulPrecision::bf16 || sizeof(T) == 2;
    const Head head = Head::make<T>(state);
    const Tensor grad_nll = large_random<float>({head.t}),
                 grad_hidden = Tensor::zeros(cuda_exec(), {head.t, head.e}, dtype_of<T>),
                 grad_weight = Tensor::zeros(cuda_exec(), {head.v, head.e});
    const auto step = [&](int) {
        cuda::linear_cross_entropy_backward(ex,
                                            {head.hidden,
                                             head.weight,
                                             head.targets.view<const int32_t, 1>(),
                                             grad_nll.view<const float, 1>(),
                                             head.nll.view<float, 1>(),
                                             grad_hidden,
                                             grad_weight.view<float, 2>(),
                                             {.hidden = true}},
                                            head.tile_bytes(state));
    };
    step(0);
    head.verify(round ? 1e-2 : 1e-4);
    time_graph(state, 1, step);
    report_rate(state, "FLOP/s", static_cast<double>(6 * head.t * head.v * head.e),
                round ? kBf16Flops : kF32Flops);
    state.counters["scratch MiB"] = static_cast<double>(ex.allocator->peak_bytes()) / 1048576.0;
}
void backward_bf16(benchmark::State& state) { backward<bf16>(state, MatmulPrecision::bf16); }
void backward_rounded(benchmark::State& state) { backward<float>(state, MatmulPrecision::bf16); }
void backward_f32(benchmark::State& state) { backward<float>(state, MatmulPrecision::f32); }

void tiles(benchmark::internal::Benchmark* b) {
    for (const int64_t mebibytes : {256, 384, 512, 544, 1024}) b->Args({16384, 50288, 768, mebibytes});
    b->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(5);
}
void one(benchmark::internal::Benchmark* b) {
    b->Args({4096, 50288, 768, 512})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(3);
}

BENCHMARK(forward<bf16>)->Apply(tiles);
BENCHMARK(forward<float>)->Apply(one);
BENCHMARK(backward_bf16)->Apply(tiles);
BENCHMARK(backward_rounded)
    ->Args({16384, 50288, 768, 512})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(5);
BENCHMARK(backward_f32)->Apply(one);

}  // namespace
}  // namespace ssm
