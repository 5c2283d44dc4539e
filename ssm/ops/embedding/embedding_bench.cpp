// Mamba-130M (v 50280, e 768): each iteration looks up other tokens of the vocabulary, so that rows come from
// memory.
#include "ssm/ops/embedding/embedding.h"

#include "ssm/core/dtype.h"
#include "tests/support/bench.h"

namespace ssm {
namespace {

struct Ids {
    test::Buffer<int32_t> values;
    Ids(int64_t t, int64_t v) : values(draw(t, v)) {}
    // The i-th of the pieces of t ids.
    View<const int32_t, 1> piece(int64_t i, int64_t t) const {
        const int64_t pieces = static_cast<int64_t>(values.size()) / t;
        return {values.data() + i % pieces * t, {t}};
    }
    static std::vector<int32_t> draw(int64_t t, int64_t v) {
        std::vector<int32_t> ids;
        uint64_t x = 1;
        for (int64_t i = 0; i < t; ++i) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            ids.push_back(static_cast<int32_t>((x >> 33) % static_cast<uint64_t>(v)));
        }
        return ids;
    }
};

template <class W, class Y>
void forward(benchmark::State& state) {
    const int64_t t = state.range(0), v = state.range(1), e = state.range(2);
    test::Random random(1);
    const Ids ids(std::max<int64_t>(t, 65536), v);
    const test::Buffer<W> weight(random.vector<W>(v * e));
    const test::Buffer<Y> y(test::nan_vector<Y>(t * e));
    const auto step = [&](int64_t i) {
        embedding<W, Y>(test::bench_exec(), ids.piece(i, t), {weight.data(), {v, e}}, {y.data(), {t, e}});
    };
    step(0);
    std::vector<double> expected;
    for (size_t i = 0; i < static_cast<size_t>(t); ++i)
        for (int64_t j = 0; j < e; ++j)
            expected.push_back(
                static_cast<double>(static_cast<float>(weight[static_cast<size_t>(ids.values[i] * e + j)])));
    test::require_right(y, expected, 5e-3);
    int64_t next = 0;
    for (auto _ : state) step(++next);
    test::report_bytes(state, static_cast<double>(t * e * static_cast<int64_t>(sizeof(W) + sizeof(Y))));
}

void backward(benchmark::State& state) {
    const int64_t t = state.range(0), v = state.range(1), e = state.range(2);
    test::Random random(1);
    const Ids ids(t, v);
    const test::Buffer<float> grad_y(random.vector(t * e)),
        grad_weight(std::vector<float>(static_cast<size_t>(v * e)));
    const auto step = [&] {
        embedding_backward(test::bench_exec(), ids.piece(0, t), {grad_y.data(), {t, e}},
                           {grad_weight.data(), {v, e}});
    };
    step();
    std::vector<double> expected(static_cast<size_t>(v * e));
    for (int64_t i = 0; i < t; ++i)
        for (int64_t j = 0; j < e; ++j)
            expected[static_cast<size_t>(ids.values[static_cast<size_t>(i)] * e + j)] +=
                static_cast<double>(grad_y[static_cast<size_t>(i * e + j)]);
    test::require_right(grad_weight, expected, 1e-5);
    for (auto _ : state) step();
    test::report_bytes(state, static_cast<double>(t * e * 12));
}

BENCHMARK(forward<float, float>)->Args({1, 50280, 768})->Args({512, 50280, 768})->UseRealTime();
BENCHMARK(forward<bf16, bf16>)->Args({1, 50280, 768})->Args({512, 50280, 768})->UseRealTime();
BENCHMARK(backward)->Args({2048, 256, 256})->Args({2048, 50280, 768})->UseRealTime();

}  // namespace
}  // namespace ssm
