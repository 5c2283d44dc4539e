#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm train`.
void add_train(CLI::App& app);

}  // namespace ssm::cli
