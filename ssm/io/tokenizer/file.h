// Whole files, also .zst, into memory.
#pragma once

#include <filesystem>
#include <string>

namespace ssm::tokenizer {

// The content of `path`, decompressed if its name ends in .zst; at most 1 GiB.
std::string read_file(const std::filesystem::path& path);

}  // namespace ssm::tokenizer
