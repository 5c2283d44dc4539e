// What the commands share: the options of a run, and how they become an Exec and a model.
#pragma once

#include <CLI/CLI.hpp>

#include <filesystem>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "ssm/core/exec.h"
#include "ssm/models/language_model.h"

namespace ssm::cli {

// Checks of numbers, NaN included, that say what is asked for.
extern const CLI::Validator kPositive, kNotNegative, kBelowOne;
// Numbers that no integer of 64 bits holds are refused, in every option of the command and its subcommands.
void refuse_overflow(CLI::App& command);

struct RunOptions {
    std::string device = "cpu";
    std::string dtype = "f32";
    int threads = 0;  // 0: all cores
    bool json = false;

    // Adds --device, --dtype, --threads and --json.
    void add_to(CLI::App& command);
    Exec exec() const;  // throws for a device that this build or machine lacks
    DType type() const { return dtype == "bf16" ? DType::bf16 : DType::f32; }
};

// --recompute [none|cheap|layers] of commands that train; without a value it means layers.
void add_recompute(CLI::App& command, std::string& value);
// Where the option was not given: cheap on a GPU, none on the CPU, which has no other.
Recompute recompute_of(const std::string& value, Device device);

// --state-dtype: what a decoder keeps its states as.
struct StateOptions {
    std::string dtype = "f32";

    void add_to(CLI::App& command);
    DType type() const { return dtype == "bf16" ? DType::bf16 : DType::f32; }
};

// The model that ships with the program: beside the sources or under share/ssm of the installation. Throws
// when neither is there.
std::filesystem::path shipped_model();

// "1 2 3" or "1,2,3" -> ids; throws naming what is not a number.
std::vector<int32_t> parse_ids(const std::string& text);

// Prints one JSON object on stdout.
void print_json(const nlohmann::ordered_json& object);

// A whole file as text, also .zst, or stdin for "-".
std::string read_text(const std::string& path);

}  // namespace ssm::cli
