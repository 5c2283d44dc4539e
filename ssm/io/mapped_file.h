// A file's bytes, read-only: memory-mapped where the system can, read into memory where it cannot.
//
// Errors (code io): "[file] PATH: does not exist", "... is a directory", "... is empty", and the system's own
// words for the rest. Content that another process truncates while it is mapped cannot be guarded against:
// this project never does that to a file that has readers (atomic_file.h renames).
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

class MappedFile {
public:
    enum class Access { map, read };  // read: a private copy, also the fallback when mapping is refused

    static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path,
                                                  Access access = Access::map);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::span<const std::byte> bytes() const { return bytes_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }
    const std::filesystem::path& path() const { return path_; }
    bool mapped() const { return mapped_; }

private:
    MappedFile() = default;

    std::filesystem::path path_;
    std::span<const std::byte> bytes_;
    std::unique_ptr<std::byte[]> copy_;
    bool mapped_ = false;
};

// The content of a small text file. Throws when it is larger than `max_bytes`; an empty file is "".
std::string read_text_file(const std::filesystem::path& path, size_t max_bytes = size_t{256} << 20);

}  // namespace ssm
