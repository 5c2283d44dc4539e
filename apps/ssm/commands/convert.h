#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm convert`.
void add_convert(CLI::App& app);

}  // namespace ssm::cli
