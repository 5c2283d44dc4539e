#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm generate`.
void add_generate(CLI::App& app);

}  // namespace ssm::cli
