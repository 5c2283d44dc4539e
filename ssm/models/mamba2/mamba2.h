// Mamba-2 (Dao & Gu 2024): transformers' `mamba2` and mamba_ssm's "Mamba2".
//
// Blocks x <- x + Mixer(RMSNorm(x)), logits = E RMSNorm(x). Equations: ssm/nn/mamba2.h. Tensors: README.md.
// Trap: the gated norm of mamba_ssm runs per B/C group, that of transformers over all channels.
#pragma once

#include "ssm/models/registry.h"

namespace ssm::mamba2 {

bool matches(const ConfigReader& config);
ModelSpec read(const ConfigReader& config);
std::string new_config(const NewModel& shape);
std::string convert_config(const ConfigReader& config, Layout to);

inline constexpr Architecture kArchitecture{"mamba2", matches, read, new_config, convert_config};

}  // namespace ssm::mamba2
