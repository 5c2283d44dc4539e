#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm verify`.
void add_verify(CLI::App& app);

}  // namespace ssm::cli
