// AdamW and the norm on a GPU over parameters as Mamba-130M has them (129 M in 242 tensors, most of them in
// in_proj, out_proj and the embedding), and over one tensor.
#include "ssm/ops/adamw/adamw.h"
#include "tests/support/cuda_bench.h"

namespace ssm {
namespace {

using namespace test;

constexpr double kNormBytes = 4.0;

// Counts of the parameters: 24 layers, head, final norm.
std::vector<int64_t> mamba_130m() {
    std::vector<int64_t> counts{50280 * 768, 768};
    for (int layer = 0; layer < 24; ++layer)
        for (const int64_t count :
             {3072 * 768, 768 * 1536, 80 * 1536, 1536 * 48, 1536 * 16, 1536 * 4, 1536, 1536, 1536, 768})
            counts.push_back(count);
    return counts;
}

struct Model {
    const Exec& ex = cuda_exec();
    int64_t total = 0;
    std::vector<int64_t> begins, counts;
    Tensor param, grad, m, v, rounded;
    Tensor rates = on_device(std::vector<float>{1e-3f, 0.1f, 0.05f}, {3}), norm = Tensor::zeros(ex, {1});

    explicit Model(std::vector<int64_t> all) : counts(std::move(all)) {
        for (const int64_t count : counts) begins.push_back(total), total += (count + 63) / 64 * 64;
        param = large_random<float>({total});
        grad = large_random<float>({total});
        m = Tensor::zeros(ex, {total});
        v = Tensor::zeros(ex, {total});
        rounded = Tensor::zeros(ex, {total}, DType::bf16);
    }
    AdamWTable table(bool rounds) const {
        std::vector<AdamWParameter> parameters;
        for (size_t i = 0; i < counts.size(); ++i) {
            const auto part = [&](const Tensor& t) {
                return t.rows(begins[i], begins[i] + counts[i]).view<float, 1>();
            };
            parameters.push_back({part(param), part(grad), part(m), part(v), {}, 0.1f});
            if (rounds)
                parameters.back().rounded = rounded.rows(begins[i], begins[i] + counts[i]).view<bf16, 1>();
        }
        return AdamWTable(ex, parameters);
    }
};

void step(benchmark::State& state, const std::vector<int64_t>& counts, bool rounds) {
    const Model model(counts);
    const AdamWTable table = model.table(rounds);
    const AdamWOptions options{.clip = 1e9f};
    const auto first = from_device<float>(model.grad);
    const auto run = [&](int) {
        adamw_step(model.ex, table, options, model.rates.view<const float, 1>(),
                   model.norm.view<const float, 1>());
    };
    run(0);
    const auto moments = from_device<float>(model.m);
    for (size_t i = 0; i < counts.size(); ++i) {
        const auto at = static_cast<size_t>(model.begins[i] + counts[i] - 1);
        require_close(static_cast<double>(moments[at]), 0.1 * static_cast<double>(first[at]), 1e-6);
    }
    time_graph(state, 1, run);
    report_rate(state, "bytes/s", (rounds ? 34.0 : 32.0) * static_cast<double>(model.total), kCopyBytes);
}

void norm(benchmark::State& state, const std::vector<int64_t>& counts) {
    const Model model(counts);
    const AdamWTable table = model.table(false);
    const auto grad = from_device<float>(model.grad);
    double sum = 0;
    for (size_t i = 0; i < counts.size(); ++i)
        for (int64_t j = 0; j < counts[i]; ++j) {
            const auto g = static_cast<double>(grad[static_cast<size_t>(model.begins[i] + j)]);
            sum += g * g;
        }
    const auto run = [&](int) { gradient_norm(model.ex, table, model.norm.view<float, 1>()); };
    run(0);
    require_close(static_cast<double>(model.norm.item()), std::sqrt(sum), 1e-6 * std::sqrt(sum));
    time_graph(state, 1, run);
    report_rate(state, "bytes/s", kNormBytes * static_cast<double>(model.total), kCopyBytes);
}

const bool registered = [] {
    const auto add = [](const char* name, void (*f)(benchmark::State&)) {
        benchmark::RegisterBenchmark(name, f)->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(20);
    };
    add("adamw mamba-130m", [](benchmark::State& s) { step(s, mamba_130m(), false); });
    add("adamw mamba-130m, rounded", [](benchmark::State& s) { step(s, mamba_130m(), true); });
    add("adamw 129M in one", [](benchmark::State& s) { step(s, {129000000}, false); });
    add("norm mamba-130m", [](benchmark::State& s) { norm(s, mamba_130m()); });
    add("norm 129M in one", [](benchmark::State& s) { norm(s, {129000000}); });
    return true;
}();

}  // namespace
}  // namespace ssm
