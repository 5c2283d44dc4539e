#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm task`.
void add_task(CLI::App& app);

}  // namespace ssm::cli
