// Whole models on the GPU: the checkpoints of transformers and mamba_ssm, and what the CPU computes.
#include <gtest/gtest.h>

#include "ssm/generate/evaluate.h"
#include "ssm/models/registry.h"
#include "ssm/models/verify.h"
#include "tests/support/cuda.h"
#include "tests/support/shared.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;

class VerifyCuda : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Models, VerifyCuda,
                         testing::Values("mamba", "mamba2", "falcon_mamba", "mamba_ssm_mamba1",
                                         "mamba_ssm_mamba2"),
                         [](const auto& param_info) { return std::string(param_info.param); });

TEST_P(VerifyCuda, Passes) {
    const fs::path dir = golden_model(GetParam());
    if (dir.empty()) GTEST_SKIP() << "needs the shared fixtures (SSM_SHARED)";
    const Verified v = verify_model(cuda_exec(), dir, {.logits_tolerance = 1e-4, .gradient_tolerance = 1e-4});
    for (const auto& q : v.quantities) EXPECT_TRUE(q.ok()) << q.name << " " << q.error;
    EXPECT_GT(v.quantities.size(), 20u);  // logits, loss, greedy and every gradient
}

TEST_P(VerifyCuda, PassesInBf16) {
    const fs::path dir = golden_model(GetParam());
    if (dir.empty()) GTEST_SKIP() << "needs the shared fixtures (SSM_SHARED)";
    const Verified v = verify_model(cuda_exec(), dir, {.dtype = DType::bf16, .logits_tolerance = 2e-2});
    ASSERT_EQ(v.quantities.size(), 1u);
    EXPECT_TRUE(v.ok()) << v.quantities[0].error;
    EXPECT_GT(v.quantities[0].error, 1e-5);  // it did compute in bf16
}

// The shipped model over ids of a fixed sequence, windows and carried state.
TEST(EvaluateCuda, SaysWhatTheCpuSays) {
    std::vector<int32_t> ids;
    Random random(1);
    for (int i = 0; i < 700; ++i) ids.push_back(static_cast<int32_t>(random.next() % 256));
    for (const bool carry : {false, true}) {
        const auto nll = [&](const Exec& ex) {
            const auto model = load_model(source_dir() / "models/stories", DType::f32);
            model->move_to(ex);
            return evaluate(ex, *model, ids, {.window = 100, .carry_state = carry}).mean_nll();
        };
        const double there = nll(cuda_exec()), here = nll(make_cpu_exec(1));
        EXPECT_NEAR(there, here, 1e-4 * here) << carry;
    }
}

}  // namespace
}  // namespace ssm::test
