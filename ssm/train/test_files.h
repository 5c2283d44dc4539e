// What the tests of this folder share beside tests/support: writing a file anywhere.
#pragma once

#include "tests/support/temp_folder.h"

namespace ssm::test {

inline std::filesystem::path write_text(const std::filesystem::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
    return path;
}

}  // namespace ssm::test
