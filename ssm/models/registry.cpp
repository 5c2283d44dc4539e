#include "ssm/models/registry.h"

#include <cstring>

#include "ssm/io/atomic_file.h"
#include "ssm/io/json/config_reader.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/safetensors/checkpoint.h"
#include "ssm/models/falcon_mamba/falcon_mamba.h"
#include "ssm/models/mamba/mamba.h"
#include "ssm/models/mamba2/mamba2.h"

namespace ssm {
namespace {

// The known architectures; the first that matches a config wins.
constexpr Architecture kArchitectures[] = {
    mamba::kArchitecture,
    mamba2::kArchitecture,
    falcon_mamba::kArchitecture,
};

std::string known_names() {
    std::string names;
    for (const Architecture& a : kArchitectures)
        names += fmt::format("{}{}", names.empty() ? "" : ", ", a.name);
    return names;
}

const Architecture& match(const ConfigReader& config, std::string_view where) {
    for (const Architecture& a : kArchitectures) {
        if (a.matches(config)) return a;
    }
    if (!config.has("model_type")) {
        fail(ErrorCode::unsupported, where,
             "'model_type' is missing; known: {}, and the original mamba_ssm layout", known_names());
    }
    const auto name = config.get<std::string>("model_type");
    fail(ErrorCode::unsupported, where, "unknown 'model_type' \"{}\"; known: {}", name, known_names());
}

void load_parameter(Checkpoint& checkpoint, const std::string& name, Parameter& p, DType dtype) {
    const Tensor stored = checkpoint.tensor(name, p.shape);
    const DType type = stored.dtype();
    if (type != DType::f32 && type != DType::bf16 && type != DType::f16 && type != DType::f64)
        fail(ErrorCode::bad_file, "model", "'{}' holds {}; floating point is needed", name, name_of(type));
    const Tensor value = stored.to(p.kind == Parameter::Kind::matrix ? dtype : DType::f32);
    // Own memory: huge pages, and the file may change later.
    p.var = Var(value.raw() == stored.raw() ? stored.clone() : value);
}

// A tied model's file may hold the head too; it must then be the embedding.
void check_tied_head(Checkpoint& checkpoint, const ModelSpec& spec) {
    if (!spec.tie_embeddings || !checkpoint.contains(spec.head_name)) return;
    const Tensor head = checkpoint.tensor(spec.head_name), embedding = checkpoint.tensor(spec.embedding_name);
    if (head.dtype() != embedding.dtype() || head.shape() != embedding.shape() ||
        std::memcmp(head.raw(), embedding.raw(), head.bytes()) != 0) {
        fail(ErrorCode::bad_file, "model", "'{}' differs from '{}' although config.json ties them",
             spec.head_name, spec.embedding_name);
    }
}

// The config with "dtype" (transformers 4: "torch_dtype"), where it has one, naming what is saved. As text,
// so that the rest stays as it was written.
std::string with_dtype(std::string config, DType dtype) {
    for (const std::string_view key : {"\"dtype\"", "\"torch_dtype\""}) {
        const size_t at = config.find(key);
        if (at == std::string::npos) continue;
        const size_t colon = config.find_first_not_of(" \t\r\n", at + key.size());
        if (colon == std::string::npos || config[colon] != ':') continue;
        const size_t open = config.find_first_not_of(" \t\r\n", colon + 1);
        if (open == std::string::npos || config[open] != '"') continue;
        const size_t close = config.find('"', open + 1);
        if (close == std::string::npos) continue;
        config.replace(open + 1, close - open - 1, dtype == DType::bf16 ? "bfloat16" : "float32");
    }
    return config;
}

}  // namespace

std::span<const Architecture> architectures() { return kArchitectures; }

const Architecture& find_architecture(std::string_view name) {
    for (const Architecture& a : kArchitectures) {
        if (a.name == name) return a;
    }
    fail(ErrorCode::invalid_argument, "model", "unknown architecture '{}'; known: {}", name, known_names());
}

std::unique_ptr<LanguageModel> build_model(std::string_view config_text, std::string_view where) {
    const ConfigReader config = ConfigReader::parse(config_text, std::string(where));
    ModelSpec spec = match(config, where).read(config);
    config.finish();
    if (spec.config.empty()) spec.config = std::string(config_text);
    return std::make_unique<LanguageModel>(std::move(spec));
}

std::unique_ptr<LanguageModel> load_model(const std::filesystem::path& dir, DType dtype) {
    const std::filesystem::path file = dir / "config.json";
    auto model = build_model(read_text_file(file), "config");
    Checkpoint checkpoint = Checkpoint::open(dir);
    check_tied_head(checkpoint, model->spec());
    model->visit([&](const std::string& name, Parameter& p) { load_parameter(checkpoint, name, p, dtype); });
    checkpoint.require_all_claimed();
    return model;
}

void save_model(LanguageModel& model, const std::filesystem::path& dir, const SaveOptions& options) {
    const ModelSpec& spec = model.spec();
    std::string config_text = spec.config, embedding_name = spec.embedding_name;
    if (options.layout != spec.layout) {
        const ConfigReader config = ConfigReader::parse(spec.config, "config");
        config_text = find_architecture(spec.architecture).convert_config(config, options.layout);
        embedding_name = build_model(config_text, "config")->spec().embedding_name;
    }
    std::vector<NamedTensor> tensors;
    model.visit([&](const std::string& name, Parameter& p) {
        const DType dtype = p.kind == Parameter::Kind::matrix ? options.dtype : DType::f32;
        tensors.push_back(
            {name == spec.embedding_name ? embedding_name : name, p.value().to_host().to(dtype)});
    });
    write_checkpoint(dir, tensors, options.max_shard_bytes);
    write_file_atomic(dir / "config.json", with_dtype(config_text, options.dtype));
}

}  // namespace ssm
