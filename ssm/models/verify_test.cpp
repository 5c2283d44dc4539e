// verify: checkpoints made by transformers and mamba_ssm pass; one changed value anywhere does not.
#include "ssm/models/verify.h"

#include <gtest/gtest.h>

#include "ssm/io/safetensors/safetensors.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;

class VerifyFixture : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Models, VerifyFixture,
                         testing::Values("mamba", "mamba2", "falcon_mamba", "mamba_ssm_mamba1",
                                         "mamba_ssm_mamba2"),
                         [](const auto& param_info) { return std::string(param_info.param); });

TEST_P(VerifyFixture, Passes) {
    const fs::path dir = golden_model(GetParam());
    if (dir.empty()) GTEST_SKIP() << "needs the shared fixtures (SSM_SHARED)";
    for (const int threads : {1, 2}) {
        const Verified v = verify_model(make_cpu_exec(threads), dir, {});
        for (const auto& q : v.quantities) {
            EXPECT_TRUE(q.ok()) << q.name << " " << q.error;
            // The aim is ten times stricter than the tolerance.
            EXPECT_LE(q.error, q.tolerance / 10) << q.name;
        }
        EXPECT_TRUE(v.ok());
        EXPECT_GT(v.quantities.size(), 20u);  // logits, loss, greedy and every gradient
    }
}

TEST_P(VerifyFixture, PassesInBf16) {
    const fs::path dir = golden_model(GetParam());
    if (dir.empty()) GTEST_SKIP() << "needs the shared fixtures (SSM_SHARED)";
    const Verified v = verify_model(make_cpu_exec(1), dir, {.dtype = DType::bf16, .logits_tolerance = 2e-2});
    ASSERT_EQ(v.quantities.size(), 1u);
    EXPECT_TRUE(v.ok()) << v.quantities[0].error;
    EXPECT_GT(v.quantities[0].error, 1e-5);  // it did compute in bf16
}

// A copy of a golden model whose expectation `change` may alter.
class Tampered {
public:
    explicit Tampered(const std::function<void(std::vector<NamedTensor>&)>& change) {
        const fs::path golden = golden_model("mamba_ssm_mamba1");
        for (const char* name : {"config.json", "model.safetensors"})
            fs::copy_file(golden / name, folder_ / name);
        const auto file = SafetensorsFile::open(golden / "expected.safetensors");
        std::vector<NamedTensor> tensors;
        for (const TensorInfo& info : file.tensors())
            tensors.push_back({info.name, file.tensor(info.name).clone()});
        change(tensors);
        write_safetensors(folder_ / "expected.safetensors", tensors);
    }
    Verified verify() const { return verify_model(make_cpu_exec(1), folder_.path(), {}); }
    const fs::path& path() const { return folder_.path(); }

private:
    TempFolder folder_;
};

Tensor& find(std::vector<NamedTensor>& tensors, const std::string& name) {
    for (NamedTensor& t : tensors) {
        if (t.name == name) return t.tensor;
    }
    throw std::runtime_error(name + " is not there");
}

void expect_only_failure(const Verified& v, const std::string& name) {
    EXPECT_FALSE(v.ok());
    for (const auto& q : v.quantities) EXPECT_EQ(q.ok(), q.name != name) << q.name << " " << q.error;
}

TEST(VerifyTampered, UnchangedPasses) {
    EXPECT_TRUE(Tampered([](std::vector<NamedTensor>&) {}).verify().ok());
}

TEST(VerifyTampered, OneChangedValueFails) {
    const std::string gradient = "grad.backbone.layers.1.mixer.A_log";
    const auto change_float = [](const std::string& name, int64_t at, float by) {
        return Tampered([=](std::vector<NamedTensor>& t) { find(t, name).data<float>()[at] += by; }).verify();
    };
    expect_only_failure(change_float("logits", 5000, 0.1f), "logits");
    expect_only_failure(change_float("loss", 0, 0.01f), "loss");
    expect_only_failure(change_float(gradient, 17, 0.01f), gradient);
    expect_only_failure(change_float("grad.backbone.embedding.weight", 1000, 0.05f),
                        "grad.backbone.embedding.weight");
    expect_only_failure(change_float("logits", 0, NAN), "logits");
    const auto greedy = Tampered([](std::vector<NamedTensor>& t) {
        int64_t& last = find(t, "greedy").data<int64_t>()[42];
        last = (last + 1) % 160;
    });
    expect_only_failure(greedy.verify(), "greedy");
}

TEST(VerifyTampered, Errors) {
    const auto message = [](const std::function<void(std::vector<NamedTensor>&)>& change) {
        const Tampered t(change);
        std::string text = error_of([&] { t.verify(); });
        const std::string dir = t.path().string() + "/";  // names differ from run to run
        for (size_t at; (at = text.find(dir)) != std::string::npos;) text.erase(at, dir.size());
        return text;
    };
    const std::string gradient = "grad.backbone.norm_f.weight";
    EXPECT_EQ(
        message([&](auto& t) { std::erase_if(t, [&](const NamedTensor& x) { return x.name == gradient; }); }),
        "[verify] expected.safetensors lacks 'grad.backbone.norm_f.weight'");
    EXPECT_EQ(message([](auto& t) {
                  t.push_back({"grad.nothing", Tensor::zeros({2})});
              }),
              "[verify] expected.safetensors: 'grad.nothing' is of no parameter of the model");
    EXPECT_EQ(message([](auto& t) { find(t, "greedy").template data<int64_t>()[0] ^= 1; }),
              "[verify] expected.safetensors: 'greedy' must be [1, P+G] and begin like 'input_ids'");
    EXPECT_EQ(message([](auto& t) { find(t, "input_ids").template data<int64_t>()[3] = -2; }),
              "[verify] expected.safetensors: 'input_ids' holds the id -2");
    EXPECT_EQ(message([](auto& t) { find(t, "input_ids").template data<int64_t>()[3] = 160; }),
              "[embedding] ids[3] = 160 is outside the vocabulary [0, 160)");
    EXPECT_EQ(message([](auto& t) {
                  find(t, "input_ids") = Tensor::zeros({2, 37});
              }),
              "[verify] expected.safetensors: 'input_ids' must be an i64 matrix");
    EXPECT_EQ(message([](auto& t) {
                  find(t, "logits") = Tensor::zeros({2, 37, 159});
              }),
              "[safetensors] expected.safetensors: tensor 'logits' must be [2, 37, 160] but is [2, 37, 159]");
    EXPECT_EQ(
        message([](auto& t) { std::erase_if(t, [](const NamedTensor& x) { return x.name == "loss"; }); }),
        "[safetensors] expected.safetensors: tensor 'loss' is missing");
}

}  // namespace
}  // namespace ssm::test
