#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm inspect`.
void add_inspect(CLI::App& app);

}  // namespace ssm::cli
