// Where the tests find files: the checkout, and the folder of large shared fixtures beside it.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace ssm::test {

// The root of this checkout. The build names it: __FILE__ may be relative (ccache's base_dir), and then
// nothing is found from another working directory. SSM_SOURCE says where it is on another machine.
inline std::filesystem::path source_dir() {
    const char* variable = std::getenv("SSM_SOURCE");
    return variable != nullptr ? variable : SSM_SOURCE_DIR;
}

// The environment variable SSM_SHARED or, unset, the folder `shared` beside the checkout. Empty when there
// is no such folder: the test then skips itself.
inline std::filesystem::path shared_dir() {
    const char* variable = std::getenv("SSM_SHARED");
    const std::filesystem::path dir =
        variable ? std::filesystem::path(variable) : source_dir().parent_path() / "shared";
    return std::filesystem::is_directory(dir) ? dir : std::filesystem::path();
}

// An operator's golden file: the copy in tests/golden/ops, else the one in the shared folder. Empty when
// neither exists.
inline std::filesystem::path golden_op(const std::string& name) {
    const std::filesystem::path own = source_dir() / "tests/golden/ops" / (name + ".safetensors");
    if (std::filesystem::exists(own)) return own;
    const std::filesystem::path shared = shared_dir() / "fixtures/ops" / (name + ".safetensors");
    return std::filesystem::exists(shared) ? shared : std::filesystem::path();
}

// A checkpoint with its expected.safetensors: the copy in tests/golden/models, else the one in the shared
// folder. Empty when neither exists.
inline std::filesystem::path golden_model(const std::string& name) {
    const std::filesystem::path own = source_dir() / "tests/golden/models" / name;
    if (std::filesystem::exists(own)) return own;
    const std::filesystem::path shared = shared_dir() / "fixtures/models" / name;
    return std::filesystem::exists(shared) ? shared : std::filesystem::path();
}

}  // namespace ssm::test
