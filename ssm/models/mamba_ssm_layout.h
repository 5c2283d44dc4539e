// The original mamba_ssm package's config.json, as far as its models share it: {"d_model", "n_layer",
// "vocab_size", "ssm_cfg": {"layer", ...}, ...}; tensors are named as in transformers but for the embedding.
#pragma once

#include <nlohmann/json.hpp>

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
// The text of such a config.
std::string text(int64_t e, int64_t layers, int64_t vocab, bool tie_embeddings,
                 const nlohmann::ordered_json& ssm_cfg);

// The model of an architecture's config, in either layout: the mixer in every layer.
template <class Mixer, class C>
ModelSpec spec(const C& config, std::string_view architecture) {
    ModelSpec spec;
    spec.architecture = architecture;
    spec.layout = config.layout;
    spec.vocab = config.vocab;
    spec.e = config.mixer.e;
    spec.norm_eps = config.norm_eps;
    spec.tie_embeddings = config.tie_embeddings;
    spec.eos = config.eos;
    spec.embedding_name = config.layout == Layout::mamba_ssm ? kEmbedding : kHuggingFaceEmbedding;
    spec.final_norm_name = "backbone.norm_f.weight";
    spec.head_name = "lm_head.weight";
    for (int64_t i = 0; i < config.mixer.layers; ++i) {
        const std::string prefix = fmt::format("backbone.layers.{}", i);
        spec.layers.push_back(
            {prefix + ".norm.weight", prefix + ".mixer", std::make_unique<Mixer>(config.mixer)});
    }
    return spec;
}

}  // namespace ssm::mamba_ssm_layout
