#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm bench`.
void add_bench(CLI::App& app);

}  // namespace ssm::cli
