// Falcon Mamba (Zuo et al. 2024): transformers' `falcon_mamba`: Mamba with an RMSNorm without weight on
// delta, B and C after x_proj.
#pragma once

#include "ssm/models/registry.h"

namespace ssm::falcon_mamba {

bool matches(const ConfigReader& config);
ModelSpec read(const ConfigReader& config);
std::string new_config(const NewModel& shape);
std::string convert_config(const ConfigReader& config, Layout to);

inline constexpr Architecture kArchitecture{"falcon_mamba", matches, read, new_config, convert_config};

}  // namespace ssm::falcon_mamba
