// The original mamba_ssm package's config.json, as far as its models share it: {"d_model", "n_layer",
// "vocab_size", "ssm_cfg": {"layer", ...}, ...}; tensors are named as in transformers but for the embedding.
#pragma once

#include "ssm/io/json/config_reader.h"
#include "ssm/models/language_model.h"

namespace ssm::mamba_ssm_layout {

inline constexpr const char* kEmbedding = "backbone.embedding.weight";
inline constexpr const char* kHuggingFaceEmbedding = "backbone.embeddings.weight";

// Whether the config is in this layout with ssm_cfg.layer = `layer` (absent: "Mamba1").
bool matches(const ConfigReader& config, std::string_view layer);

struct Config {
    int64_t e, layers, vocab;  // vocab as padded
    bool tie_embeddings;
    ConfigReader ssm_cfg;
};
// Reads what all layers share; attention layers and MLPs are refused.
Config read(const ConfigReader& config);

}  // namespace ssm::mamba_ssm_layout
