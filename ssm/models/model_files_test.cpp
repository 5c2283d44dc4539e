// Model folders: what is saved loads again to the same bytes, layouts convert into each other, and a folder
// that does not fit together is refused in one line.
#include <gtest/gtest.h>

#include "ssm/io/safetensors/safetensors.h"
#include "ssm/models/registry.h"
#include "tests/support/model_case.h"
#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr auto kMamba2 = ReferenceShape::Kind::mamba2;
constexpr const char* kOriginal = "backbone.embedding.weight";  // mamba_ssm's layout

std::map<std::string, std::vector<float>> parameters(LanguageModel& model) {
    std::map<std::string, std::vector<float>> all;
    model.visit([&](const std::string& name, Parameter& p) {
        const Tensor t = p.value().to(DType::f32);
        all[name].assign(t.data<const float>(), t.data<const float>() + t.size());
    });
    return all;
}

std::vector<float> some_logits(LanguageModel& model) {
    const PackedTokens tokens({6, 1}, model.vocab());
    return run_logits(make_cpu_exec(1), model, tokens.ids, tokens.cu_seqlens);
}

const ReferenceShape kShapes[] = {
    {},
    {.tied = false, .projection_bias = true, .conv_bias = false, .r = 3},
    {.embedding = kOriginal},
    {.tied = false, .projection_bias = true, .r = 3, .bcdt_eps = 1e-6},
    {.kind = kMamba2, .tied = false, .h = 4, .p = 4, .g = 2, .dt_min = 0.25},
    {.kind = kMamba2,
     .h = 4,
     .p = 4,
     .g = 2,
     .norm_groups = 2,
     .D_has_hdim = true,
     .norm_before_gate = true,
     .dt_max = 0.5,
     .embedding = kOriginal},
};

// The same folder, saved twice, is the same bytes; loaded, it is the same model.
TEST(ModelFiles, SavedAndLoadedIsEqual) {
    for (const ReferenceShape& shape : kShapes) {
        for (const size_t shard : {size_t{5'000'000'000}, size_t{1500}}) {
            for (const DType dtype : {DType::f32, DType::bf16}) {
                SCOPED_TRACE(config_text(shape));
                const ModelCase c(shape, 1, dtype);
                const Layout layout = c.model->spec().layout;
                const TempFolder first, second;
                save_model(*c.model, first.path(),
                           {.dtype = dtype, .max_shard_bytes = shard, .layout = layout});
                EXPECT_EQ(fs::exists(first / "model.safetensors.index.json"), shard < 2000);
                const auto loaded = load_model(first.path(), dtype);
                EXPECT_EQ(loaded->dtype(), dtype);
                EXPECT_EQ(parameters(*loaded), parameters(*c.model));
                EXPECT_EQ(loaded->fingerprint(), c.model->fingerprint());
                EXPECT_EQ(some_logits(*loaded), some_logits(*c.model));
                save_model(*loaded, second.path(),
                           {.dtype = dtype, .max_shard_bytes = shard, .layout = layout});
                for (const auto& file : fs::directory_iterator(first.path())) {
                    EXPECT_EQ(read_file(second / file.path().filename().string()), read_file(file.path()));
                }
            }
        }
    }
}

// Saving over an earlier, sharded checkpoint leaves nothing of it behind.
TEST(ModelFiles, ReplacesShards) {
    const ModelCase old_one({}, 1), new_one({}, 2);
    const TempFolder folder;
    save_model(*old_one.model, folder.path(), {.max_shard_bytes = 1500});
    save_model(*new_one.model, folder.path(), {});
    EXPECT_EQ(parameters(*load_model(folder.path(), DType::f32)), parameters(*new_one.model));
}

TEST(ModelFiles, LayoutsConvertBothWays) {
    for (const ReferenceShape& shape :
         {ReferenceShape{},
          ReferenceShape{.tied = false, .projection_bias = true, .conv_bias = false, .r = 3},
          ReferenceShape{.e = 5, .d = 15, .k = 3},
          ReferenceShape{.kind = kMamba2, .tied = false, .h = 4, .p = 4, .dt_min = 0.125, .dt_max = 0.5}}) {
        const ModelCase c(shape);
        const TempFolder original, back;
        save_model(*c.model, original.path(), {.layout = Layout::mamba_ssm});
        const auto converted = load_model(original.path(), DType::f32);
        EXPECT_EQ(converted->spec().layout, Layout::mamba_ssm);
        EXPECT_EQ(converted->spec().embedding_name, kOriginal);
        EXPECT_EQ(some_logits(*converted), some_logits(*c.model));
        save_model(*converted, back.path(), {.layout = Layout::hugging_face});
        const auto returned = load_model(back.path(), DType::f32);
        EXPECT_EQ(returned->spec().layout, Layout::hugging_face);
        EXPECT_EQ(parameters(*returned), parameters(*c.model));
        EXPECT_EQ(some_logits(*returned), some_logits(*c.model));
    }
}

// A checkpoint made by mamba_ssm, converted there and back.
TEST(ModelFiles, GoldenConvertsBothWays) {
    const TempFolder there, back;
    const auto model = load_model(golden_model("mamba_ssm_mamba1"), DType::f32);
    save_model(*model, there.path(), {.layout = Layout::hugging_face});
    const auto converted = load_model(there.path(), DType::f32);
    EXPECT_EQ(some_logits(*converted), some_logits(*model));
    save_model(*converted, back.path(), {.layout = Layout::mamba_ssm});
    EXPECT_EQ(parameters(*load_model(back.path(), DType::f32)), parameters(*model));
}

TEST(ModelFiles, WhatALayoutCannotSay) {
    const auto message = [](const ReferenceShape& shape, Layout to) {
        const ModelCase c(shape);
        const TempFolder folder;
        return error_of([&] { save_model(*c.model, folder.path(), {.layout = to}); });
    };
    EXPECT_EQ(message({.bcdt_eps = 1e-6}, Layout::mamba_ssm),
              "[config] 'model_type' = \"falcon_mamba\" has no mamba_ssm layout");
    EXPECT_EQ(message({.norm_eps = 0.001}, Layout::mamba_ssm),
              "[config] 'layer_norm_epsilon' = 0.001 cannot be said in the mamba_ssm layout, only 1e-05");
    EXPECT_EQ(message({.kind = kMamba2, .g = 2}, Layout::mamba_ssm),
              "[config] 'n_groups' = 2 means another norm in the other layout");
    EXPECT_NE(message({.kind = kMamba2, .D_has_hdim = true, .embedding = kOriginal}, Layout::hugging_face)
                  .find("cannot be said in transformers' layout"),
              std::string::npos);
}

// config.json says what type the weights have: transformers reads it.
TEST(ModelFiles, ConfigSaysTheSavedType) {
    json config = json::parse(config_text({}));
    config["dtype"] = "bfloat16";
    const auto model = build_model(config.dump(), "config");
    model->initialise(1);
    const TempFolder folder;
    save_model(*model, folder.path(), {.dtype = DType::f32});
    EXPECT_EQ(json::parse(read_file(folder / "config.json"))["dtype"], "float32");
    save_model(*model, folder.path(), {.dtype = DType::bf16});
    EXPECT_EQ(json::parse(read_file(folder / "config.json"))["dtype"], "bfloat16");
}

// A saved model whose files `change` may alter before it is loaded again.
std::string load_error(const ReferenceShape& shape, const std::function<void(const fs::path&)>& change,
                       size_t shard = 5'000'000'000) {
    const ModelCase c(shape);
    const TempFolder folder;
    save_model(*c.model, folder.path(), {.max_shard_bytes = shard, .layout = c.model->spec().layout});
    change(folder.path());
    std::string text = error_of([&] { load_model(folder.path(), DType::f32); });
    for (size_t at; (at = text.find(folder.path().string())) != std::string::npos;)
        text.replace(at, folder.path().string().size(), "DIR");
    return text;
}

void rewrite(const fs::path& dir, const std::function<void(std::vector<NamedTensor>&)>& change) {
    std::vector<NamedTensor> tensors;
    {
        const auto file = SafetensorsFile::open(dir / "model.safetensors");
        for (const TensorInfo& t : file.tensors()) tensors.push_back({t.name, file.tensor(t.name).clone()});
    }
    change(tensors);
    write_safetensors(dir / "model.safetensors", tensors);
}

TEST(ModelFiles, TensorErrors) {
    const auto message = [](const std::function<void(std::vector<NamedTensor>&)>& change) {
        return load_error({}, [&](const fs::path& dir) { rewrite(dir, change); });
    };
    EXPECT_EQ(message([](auto&) {}), "(no error)");
    EXPECT_EQ(message([](auto& t) {
                  std::erase_if(t,
                                [](const NamedTensor& x) { return x.name == "backbone.layers.1.mixer.D"; });
              }),
              "[checkpoint] DIR: tensor 'backbone.layers.1.mixer.D' is missing");
    EXPECT_EQ(message([](auto& t) {
                  t.push_back({"backbone.layers.2.mixer.D", Tensor::zeros({16})});
              }),
              "[checkpoint] DIR: 1 tensor that this model does not have: 'backbone.layers.2.mixer.D'");
    EXPECT_EQ(
        message([](auto& t) {
            for (auto& x : t)
                if (x.name == "backbone.layers.0.mixer.x_proj.weight") x.tensor = Tensor::zeros({16, 10});
        }),
        "[checkpoint] DIR: tensor 'backbone.layers.0.mixer.x_proj.weight' must be [10, 16] but is [16, 10]");
    EXPECT_EQ(message([](auto& t) {
                  for (auto& x : t)
                      if (x.name == "backbone.norm_f.weight") x.tensor = Tensor::zeros({8}, DType::i32);
              }),
              "[model] 'backbone.norm_f.weight' holds i32; floating point is needed");
    EXPECT_EQ(
        message([](auto& t) {
            t.push_back({"lm_head.weight", Tensor::zeros({11, 8})});
        }),
        "[model] 'lm_head.weight' differs from 'backbone.embeddings.weight' although config.json ties them");
    EXPECT_EQ(message([](auto& t) {
                  const auto embedding =
                      std::ranges::find(t, "backbone.embeddings.weight", &NamedTensor::name);
                  t.push_back({"lm_head.weight", embedding->tensor.clone()});
              }),
              "(no error)");
}

TEST(ModelFiles, FolderErrors) {
    const auto remove = [](const char* name) {
        return [name](const fs::path& dir) { fs::remove(dir / name); };
    };
    EXPECT_EQ(load_error({}, remove("config.json")), "[file] DIR/config.json: does not exist");
    EXPECT_EQ(load_error({}, remove("model.safetensors")),
              "[checkpoint] DIR: has neither model.safetensors nor model.safetensors.index.json");
    EXPECT_EQ(load_error({}, remove("model-00002-of-00006.safetensors"), 1500),
              "[checkpoint] DIR: shard 'model-00002-of-00006.safetensors' is missing");
    EXPECT_EQ(error_of([] { load_model("/nowhere/at/all", DType::f32); }),
              "[file] /nowhere/at/all/config.json: does not exist");
}

std::string build_error(const std::string& text) {
    return error_of([&] { build_model(text, "config"); });
}
// A config with some keys replaced; null removes.
std::string build_error(const ReferenceShape& shape, const json& patch) {
    json config = json::parse(config_text(shape));
    config.merge_patch(patch);
    return build_error(config.dump());
}

TEST(ModelConfig, Accepts) {
    EXPECT_EQ(build_error({}, {{"transformers_version", "9"}, {"use_cache", false}}), "(no error)");
    EXPECT_EQ(build_error({}, {{"hidden_act", "swish"}, {"time_step_rank", "auto"}}), "(no error)");
    EXPECT_EQ(build_error({}, {{"eos_token_id", {1, 2}}}), "(no error)");
    EXPECT_EQ(build_error("{\"model_type\": \"mamba\"}"), "(no error)");  // transformers' defaults
    const auto model = build_model("{\"model_type\": \"mamba2\"}", "config");
    EXPECT_EQ(model->spec().e, 4096);
    EXPECT_EQ(model->spec().layers.size(), 64u);
    EXPECT_FALSE(model->spec().tie_embeddings);
}

TEST(ModelConfig, Errors) {
    EXPECT_EQ(build_error({}, {{"model_type", "rwkv"}}),
              "[config] unknown 'model_type' \"rwkv\"; known: mamba, mamba2, falcon_mamba");
    EXPECT_EQ(
        build_error("{\"hidden_size\": 8}"),
        "[config] 'model_type' is missing; known: mamba, mamba2, falcon_mamba, and the original mamba_ssm "
        "layout");
    EXPECT_EQ(build_error({}, {{"hidden_act", "gelu"}}),
              "[config] 'hidden_act' = \"gelu\" is not supported, only silu, swish");
    EXPECT_EQ(build_error({.kind = kMamba2}, {{"n_groups", 3}, {"num_heads", 8}}),
              "[config] 'n_groups' = 3 does not divide 'num_heads' = 8");
    EXPECT_EQ(build_error({.kind = kMamba2}, {{"head_dim", 7}}),
              "[config] 'expand' = 2.0 times 'hidden_size' = 8 must equal 'num_heads' x 'head_dim' = 14");
    EXPECT_EQ(build_error({}, {{"logits_scaling", 2}, {"moe", true}}),
              "[config] not supported: 'logits_scaling', 'moe'");
    EXPECT_EQ(build_error({}, {{"hidden_size", 0}}), "[config] 'hidden_size' = 0 must be in 1..2147483647");
    EXPECT_EQ(build_error({}, {{"hidden_size", "8"}}),
              "[config] 'hidden_size' must be an integer but is \"8\"");
    EXPECT_EQ(build_error({}, {{"conv_kernel", 1}}), "[config] 'conv_kernel' = 1 must be in 2..64");
    EXPECT_EQ(build_error({}, {{"layer_norm_epsilon", -1}}),
              "[config] 'layer_norm_epsilon' = -1 must be in 0..1");
    EXPECT_EQ(build_error({.kind = kMamba2}, {{"time_step_limit", {0.5, 0.25}}}),
              "[config] 'time_step_limit' = [0.5,0.25] must be two increasing numbers >= 0");
    EXPECT_EQ(build_error({.kind = kMamba2}, {{"rms_norm", false}}),
              "[config] 'rms_norm' = false is not supported, only true");
    EXPECT_EQ(build_error({}, {{"eos_token_id", 4294967296}}),
              "[config] 'eos_token_id' = 4294967296 must be in -1..2147483647");
}

TEST(ModelConfig, OriginalLayoutErrors) {
    const ReferenceShape shape{.embedding = kOriginal};
    EXPECT_EQ(build_error(shape, {{"rms_norm", false}}),
              "[config] 'rms_norm' = false is not supported, only true");
    EXPECT_EQ(build_error(shape, {{"d_intermediate", 64}}),
              "[config] 'd_intermediate' = 64 is not supported, only 0");
    EXPECT_EQ(build_error(shape, {{"attn_layer_idx", {1}}}),
              "[config] 'attn_layer_idx' = [1] is not supported: attention layers");
    EXPECT_EQ(build_error(shape, {{"ssm_cfg", {{"use_mem_rope", true}}}}),
              "[config] not supported: 'ssm_cfg.use_mem_rope'");
    EXPECT_EQ(build_error(shape, {{"ssm_cfg", {{"layer", "Mamba3"}}}}),
              "[config] 'ssm_cfg.layer' = \"Mamba3\" is not supported, only Mamba1, Mamba2");
    EXPECT_EQ(build_error({.kind = kMamba2, .embedding = kOriginal}, {{"ssm_cfg", {{"ngroups", 3}}}}),
              "[config] 'ssm_cfg.ngroups' = 3 does not divide 'ssm_cfg.number of heads' = 2");
    EXPECT_EQ(build_error({.kind = kMamba2, .embedding = kOriginal}, {{"ssm_cfg", {{"rmsnorm", false}}}}),
              "[config] 'ssm_cfg.rmsnorm' = false is not supported, only true");
}

// Sizes that no file could justify: refused before anything is allocated for them.
TEST(ModelConfig, HostileSizes) {
    constexpr int64_t kHuge = 2147483647;
    EXPECT_EQ(build_error({}, {{"num_hidden_layers", kHuge}}),
              "[config] 'num_hidden_layers' = 2147483647 must be in 1..4096");
    EXPECT_EQ(build_error({.embedding = kOriginal}, {{"n_layer", kHuge}}),
              "[config] 'n_layer' = 2147483647 must be in 1..4096");
    EXPECT_EQ(build_error({.kind = kMamba2}, {{"hidden_size", kHuge},
                                              {"expand", 1},
                                              {"num_heads", kHuge},
                                              {"head_dim", 1},
                                              {"n_groups", kHuge},
                                              {"state_size", kHuge}}),
              "[config] 'state_size' = 2147483647 times the number of groups, 2147483647, is too large");
    EXPECT_EQ(build_error({}, {{"expand", 0.01}, {"intermediate_size", nullptr}}),
              "[config] 'expand' = 0.01 leaves no inner width");
    EXPECT_EQ(build_error({.embedding = kOriginal}, {{"ssm_cfg", {{"expand", 0.01}}}}),
              "[config] 'ssm_cfg.expand' = 0.01 leaves no inner width");
    EXPECT_EQ(build_error({.kind = kMamba2, .embedding = kOriginal}, {{"ssm_cfg", {{"expand", 0.01}}}}),
              "[config] 'ssm_cfg.expand' = 0.01 leaves no inner width");
    // Large but possible: only the weights decide.
    EXPECT_EQ(load_error({},
                         [&](const fs::path& dir) {
                             json config = json::parse(read_file(dir / "config.json"));
                             config["vocab_size"] = kHuge;
                             std::ofstream(dir / "config.json") << config;
                         }),
              "[checkpoint] DIR: tensor 'backbone.embeddings.weight' must be [2147483647, 8] but is [11, 8]");
}

// What the library writes for a new model is what it reads.
TEST(ModelConfig, NewModelsBuild) {
    for (const Architecture& a : architectures()) {
        const NewModel shape{.vocab = 19, .e = 24, .layers = 3, .n = 8, .expand = 2, .k = 3, .p = 16, .g = 1};
        const auto model = build_model(a.new_config(shape), "config");
        EXPECT_EQ(model->spec().architecture, a.name);
        EXPECT_EQ(model->vocab(), 19);
        EXPECT_EQ(model->spec().eos, std::vector<int32_t>{0});
        model->initialise(3);
        const auto twin = build_model(a.new_config(shape), "config");
        twin->initialise(3);
        EXPECT_EQ(parameters(*model), parameters(*twin));  // the seed alone decides
        twin->initialise(4);
        EXPECT_NE(model->fingerprint(), twin->fingerprint());
    }
    EXPECT_EQ(error_of([] { find_architecture("rnn"); }),
              "[model] unknown architecture 'rnn'; known: mamba, mamba2, falcon_mamba");
}

}  // namespace
}  // namespace ssm::test
