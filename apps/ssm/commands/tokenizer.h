#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

// Adds `ssm tokenizer train|encode|decode`.
void add_tokenizer(CLI::App& app);

}  // namespace ssm::cli
