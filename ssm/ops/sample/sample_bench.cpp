// One draw from 50,280 logits, the vocabulary of Mamba-130M, in every mode.
#include "ssm/ops/sample/sample.h"

#include <algorithm>

#include "tests/support/bench.h"

namespace ssm {
namespace {

constexpr int64_t kVocabulary = 50280;

std::vector<float> logits() {  // roughly normal with a few high ones, as a language model's
    test::Random random(1);
    std::vector<float> x;
    for (int64_t i = 0; i < kVocabulary; ++i) {
        float sum = 0;
        for (int j = 0; j < 4; ++j) sum += random.uniform(-2, 2);
        x.push_back(sum + (random.integer(0, 999) == 0 ? 8.0f : 0.0f));
    }
    return x;
}

void greedy(benchmark::State& state) {
    const std::vector<float> x = logits();
    const auto best = std::max_element(x.begin(), x.end()) - x.begin();
    test::require_right(test::Buffer<int>{std::vector<int>{argmax(x)}},
                        std::vector<double>{static_cast<double>(best)}, 0);
    for (auto _ : state) benchmark::DoNotOptimize(argmax(x));
    test::report_bytes(state, 4.0 * kVocabulary);
}

void draw(benchmark::State& state, SamplerOptions options) {
    const std::vector<float> x = logits();
    std::vector<int32_t> history;
    if (options.repetition_penalty != 1) history.assign(512, 17);
    Sampler sampler(options);
    double sum = 0,
           kept = 0;  // every draw is one of the likely ids: a weak check, the test has the exact one
    for (int i = 0; i < 100; ++i) {
        sum += static_cast<double>(x[static_cast<size_t>(sampler.sample(x, kVocabulary, history))]);
    }
    for (const float v : x) kept += static_cast<double>(v);
    if (sum / 100 <= kept / kVocabulary) std::exit(1);
    for (auto _ : state) benchmark::DoNotOptimize(sampler.sample(x, kVocabulary, history));
}

BENCHMARK(greedy);
BENCHMARK_CAPTURE(draw, temperature, SamplerOptions{});
BENCHMARK_CAPTURE(draw, top_k_40, SamplerOptions{.top_k = 40});
BENCHMARK_CAPTURE(draw, top_k_2000, SamplerOptions{.top_k = 2000});
BENCHMARK_CAPTURE(draw, top_p_0_9, SamplerOptions{.top_p = 0.9f});
BENCHMARK_CAPTURE(draw, top_p_0_9_flat, SamplerOptions{.temperature = 3.0f, .top_p = 0.9f});
BENCHMARK_CAPTURE(draw, min_p_0_05, SamplerOptions{.min_p = 0.05f});
BENCHMARK_CAPTURE(draw, usual,
                  SamplerOptions{
                      .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .repetition_penalty = 1.1f});

}  // namespace
}  // namespace ssm
