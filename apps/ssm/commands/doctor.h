// `ssm doctor`: what this machine offers, and whether its GPU computes what its CPU does.
#pragma once

#include <CLI/CLI.hpp>

namespace ssm::cli {

void add_doctor(CLI::App& app);

}  // namespace ssm::cli
