// The CUDA kernels against the CPU's (which adamw_test.cpp holds against f64): several parameters and steps,
// any alignment, clipping, rounded copies, a broken norm; a captured step replayed with other rates; the norm
// to f32's precision and the same from run to run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "ssm/core/cuda/context.h"
#include "ssm/ops/adamw/adamw.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

// A parameter on both devices, `offset` elements into its memory.
struct Both {
    int64_t count, offset;
    bool rounds, keeps;
    std::vector<float> here[4];  // param, grad, m, v
    std::vector<bf16> rounded;
    Tensor there[4], rounded_there;

    Both(int64_t n, int64_t from, bool round, uint64_t seed)
        : count(n), offset(from), rounds(round), keeps(seed % 30 == 10) {
        const int64_t size = count + offset + 1;
        for (int i = 0; i < 4; ++i) {
            here[i] = test::Random(seed + static_cast<uint64_t>(i)).vector(size, i == 3 ? 0.0f : -1.0f);
            there[i] = test::on_device(here[i], {size});
        }
        rounded = test::nan_vector<bf16>(size);
        rounded_there = test::on_device(rounded, {size});
    }
    View<float, 1> view(int i, bool gpu) {
        return {(gpu ? there[i].view<float, 1>().data : here[i].data()) + offset, {count}};
    }
    AdamWParameter parameter(bool gpu) {
        AdamWParameter p{view(0, gpu), view(1, gpu), view(2, gpu), view(3, gpu), {}, 0.1f, keeps};
        if (rounds)
            p.rounded = {(gpu ? rounded_there.view<bf16, 1>().data : rounded.data()) + offset, {count}};
        return p;
    }
    // In the same memory: tables hold its address.
    void new_gradient(uint64_t seed) {
        std::ranges::copy(test::Random(seed).vector(std::ssize(here[1])), here[1].begin());
        there[1].copy_from(test::on_device(here[1], {std::ssize(here[1])}));
    }
    void compare() const {
        const char* names[] = {"param", "grad", "m", "v"};
        for (int i = 0; i < 4; ++i)
            test::expect_close(test::from_device<float>(there[i]), here[i], 1e-6, names[i]);
        test::expect_close(test::from_device<bf16>(rounded_there), test::to_double(rounded), 1e-3, "rounded");
    }
};

AdamWTable table_of(const Exec& ex, std::vector<Both>& all, bool gpu) {
    std::vector<AdamWParameter> parameters;
    for (Both& b : all) parameters.push_back(b.parameter(gpu));
    return AdamWTable(ex, parameters);
}
std::vector<float> rates_of(int64_t step, const AdamWOptions& o) {
    const auto bias = [&](float beta) {
        return static_cast<float>(1 - std::pow(static_cast<double>(beta), static_cast<double>(step)));
    };
    return {3e-3f, bias(o.beta1), bias(o.beta2)};
}

std::vector<Both> parameters() {
    std::vector<Both> all;
    uint64_t seed = 1;
    for (const int64_t count : {0, 1, 3, 4, 5, 1023, 4095, 4096, 4097, 70001})
        for (const int64_t offset : {0, 1, 4})
            all.emplace_back(count, offset, seed % 2 == 0, seed * 10), ++seed;
    return all;
}

TEST(AdamWCuda, StepsMatchCpu) {
    const Exec &ex = test::cuda_exec(), cpu = make_cpu_exec(1);
    for (const float clip : {0.0f, 1.5f}) {
        std::vector<Both> all = parameters();
        const AdamWTable here = table_of(cpu, all, false), there = table_of(ex, all, true);
        const AdamWOptions options{.clip = clip};
        const Tensor norm_there = test::on_device(test::nan_vector(1), {1});
        for (int64_t step = 1; step <= 3; ++step) {
            for (Both& b : all) b.new_gradient(static_cast<uint64_t>(step));
            float norm = NAN;
            gradient_norm(cpu, here, {&norm, {1}});
            gradient_norm(ex, there, norm_there.view<float, 1>());
            EXPECT_NEAR(norm_there.item(), norm, 1e-6f * norm);
            const std::vector<float> rates = rates_of(step, options);
            adamw_step(cpu, here, options, {rates.data(), {3}}, {&norm, {1}});
            adamw_step(ex, there, options, test::on_device(rates, {3}).view<const float, 1>(),
                       norm_there.view<const float, 1>());
        }
        for (const Both& b : all) {
            SCOPED_TRACE(testing::Message()
                         << "count " << b.count << " offset " << b.offset << " clip " << clip);
            b.compare();
        }
    }
}

TEST(AdamWCuda, BrokenGradientsChangeNothingElse) {
    const Exec& ex = test::cuda_exec();
    for (const float bad : {NAN, INFINITY}) {
        std::vector<Both> all = parameters();
        const AdamWTable table = table_of(ex, all, true);
        const Tensor norm = test::on_device(std::vector<float>{1.0f}, {1});
        all.back().there[1].rows(77, 78).copy_from(test::on_device(std::vector<float>{bad}, {1}));
        gradient_norm(ex, table, norm.view<float, 1>());
        EXPECT_FALSE(std::isfinite(norm.item()));
        adamw_step(ex, table, {.clip = 1.0f}, test::on_device(rates_of(1, {}), {3}).view<const float, 1>(),
                   norm.view<const float, 1>());
        for (Both& b : all) {
            if (!b.keeps) std::fill_n(b.here[1].begin() + b.offset, b.count, 0.0f);
            b.compare();
        }
    }
}

TEST(AdamWCuda, CapturedStepTakesNewRates) {
    const Exec &ex = test::cuda_exec(), cpu = make_cpu_exec(1);
    std::vector<Both> all = parameters();
    const AdamWTable here = table_of(cpu, all, false), there = table_of(ex, all, true);
    const AdamWOptions options{.clip = 1.0f};
    const Tensor norm_there = Tensor::zeros(ex, {1}), rates_there = Tensor::zeros(ex, {3});
    gradient_norm(ex, there, norm_there.view<float, 1>());  // its scratch is there before it is captured
    const cudaStream_t stream = cuda::stream_of(ex);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "test");
    gradient_norm(ex, there, norm_there.view<float, 1>());
    adamw_step(ex, there, options, rates_there.view<const float, 1>(), norm_there.view<const float, 1>());
    cuda::check(cudaStreamEndCapture(stream, &graph), "test");
    cuda::check(cudaGraphInstantiate(&replay, graph, 0), "test");
    for (int64_t step = 1; step <= 3; ++step) {
        for (Both& b : all) b.new_gradient(static_cast<uint64_t>(step));
        const std::vector<float> rates = rates_of(step, options);
        rates_there.copy_from(test::on_device(rates, {3}));
        cuda::check(cudaGraphLaunch(replay, stream), "test");
        float norm = NAN;
        gradient_norm(cpu, here, {&norm, {1}});
        adamw_step(cpu, here, options, {rates.data(), {3}}, {&norm, {1}});
    }
    synchronize(ex);
    for (const Both& b : all) b.compare();
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
}

TEST(AdamWCuda, NormIsReproducible) {
    const Exec& ex = test::cuda_exec();
    std::vector<Both> all = parameters();
    const AdamWTable table = table_of(ex, all, true);
    const Tensor norm = Tensor::zeros(ex, {1});
    gradient_norm(ex, table, norm.view<float, 1>());
    const float first = norm.item();
    for (int i = 0; i < 4; ++i) {
        gradient_norm(ex, table, norm.view<float, 1>());
        EXPECT_EQ(norm.item(), first);
    }
    const AdamWTable none(ex, {});
    gradient_norm(ex, none, norm.view<float, 1>());
    EXPECT_EQ(norm.item(), 0.0f);
}

}  // namespace
}  // namespace ssm
