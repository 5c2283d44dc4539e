#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm eval`.
void add_eval(CLI::App& app);

}  // namespace ssm::cli
