// The architectures that ssm.cpp knows: a visible table. A new family is a folder beside mamba/ and a line in
// registry.cpp.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "ssm/models/language_model.h"

namespace ssm {

class ConfigReader;  // ssm/io/json/config_reader.h

// The shape of a model that does not exist yet (`ssm train --arch`, `ssm bench --shape`). 0: the
// architecture's rule.
struct NewModel {
    int64_t vocab = 256, e = 256, layers = 8;
    int64_t n = 0;  // state size
    int64_t expand = 2;
    int64_t k = 4;  // convolution width
    int64_t p = 0;  // head dimension
    int64_t g = 1;  // B/C groups
    int64_t dt_rank = 0;
    double dt_min = 0, dt_max = 0;  // range that the first step sizes are drawn from
    bool tie_embeddings = true;
    int32_t eos = 0;
};

struct Architecture {
    std::string_view name;  // transformers' model_type
    // Whether this config.json is one of its own (either layout).
    bool (*matches)(const ConfigReader& config);
    // Reads every key that changes the mathematics; ConfigReader::finish reports the others.
    ModelSpec (*read)(const ConfigReader& config);
    // The config.json of a new model in transformers' layout.
    std::string (*new_config)(const NewModel& shape);
    // The config.json of the same model in another layout; throws where that layout cannot express it.
    std::string (*convert_config)(const ConfigReader& config, Layout to);
};

std::span<const Architecture> architectures();
const Architecture& find_architecture(std::string_view name);  // throws, naming the known ones

// The model that a config.json text describes, without parameters. `where` names the file in errors.
std::unique_ptr<LanguageModel> build_model(std::string_view config_text, std::string_view where);

// A model folder: config.json and safetensors, checked against each other: no tensor missing, none unclaimed,
// shapes equal. Matrices are converted to `dtype` (f32 or bf16), everything else to f32.
std::unique_ptr<LanguageModel> load_model(const std::filesystem::path& dir, DType dtype);

// Writes config.json and model.safetensors (shards above max_shard_bytes) in `dtype`; the folder
// must exist. With `layout` another one than the model's, config and names are translated.
struct SaveOptions {
    DType dtype = DType::f32;
    size_t max_shard_bytes = size_t{5'000'000'000};
    Layout layout = Layout::hugging_face;
};
void save_model(LanguageModel& model, const std::filesystem::path& dir, const SaveOptions& options);

}  // namespace ssm
