// What commands with a trainer share: options, and recipe.json, which has a run's options by name, so that it
// can be repeated and resumed.
#pragma once

#include <CLI/CLI.hpp>

#include <filesystem>

#include "ssm/train/trainer.h"

namespace ssm::cli {

// Gives every option that the command line left open the recipe's value. Keys are the options' names.
void apply_recipe(CLI::App& command, const std::filesystem::path& path);

// All options in use, so that `--out DIR --resume` says it all.
void write_recipe(const CLI::App& command, const std::filesystem::path& path);

// Options of the trainer's loop that every command with a trainer has: warm-up, decay, clipping, checkpoints.
void add_loop_options(CLI::App& command, TrainOptions& options);

}  // namespace ssm::cli
