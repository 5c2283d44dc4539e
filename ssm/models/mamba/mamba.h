// Mamba (Gu & Dao 2023): transformers' `mamba` and mamba_ssm's "Mamba1".
//
// Blocks x <- x + Mixer(RMSNorm(x)), logits = E RMSNorm(x). Equations: ssm/nn/mamba.h. Tensors: README.md.
#pragma once

#include "ssm/models/registry.h"
#include "ssm/nn/mamba.h"

namespace ssm::mamba {

// What both layouts of the config say.
struct Config {
    Layout layout = Layout::hugging_face;
    MambaConfig mixer;
    int64_t vocab = 50280;
    float norm_eps = 1e-5f;
    bool tie_embeddings = true;
    std::vector<int32_t> eos;
};

// Keys shared with falcon_mamba, in transformers' names and with its defaults.
Config read_hugging_face(const ConfigReader& config);
ModelSpec make_spec(const Config& config, std::string_view architecture);

bool matches(const ConfigReader& config);
ModelSpec read(const ConfigReader& config);
std::string new_config(const NewModel& shape);
std::string convert_config(const ConfigReader& config, Layout to);

inline constexpr Architecture kArchitecture{"mamba", matches, read, new_config, convert_config};

}  // namespace ssm::mamba
