// recipe.json: the options of a training run, by name, so that it can be repeated and resumed.
#pragma once

#include <CLI/CLI.hpp>

#include <filesystem>

namespace ssm::cli {

// Gives every option that the command line left open the recipe's value. Keys are the options' names.
void apply_recipe(CLI::App& command, const std::filesystem::path& path);

// All options in use, so that `--out DIR --resume` says it all.
void write_recipe(const CLI::App& command, const std::filesystem::path& path);

}  // namespace ssm::cli
