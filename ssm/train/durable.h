// Files that are either there whole or not at all, even if the process or the machine stops at any moment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>

namespace ssm {

// Creates the folder and its parents. Throws Error (io).
void make_directories(const std::filesystem::path& folder);
// Makes a file's content, or a folder's entries, survive a power failure. Throws Error (io).
void sync_path(const std::filesystem::path& path);
// Renames and syncs the parent folder. Throws Error (io).
void durable_rename(const std::filesystem::path& from, const std::filesystem::path& to);

// Written under a temporary name beside `target`; commit() syncs and renames. Without commit() nothing is
// left. Every failure (a full disk, say) throws Error (io).
class DurableFile {
public:
    explicit DurableFile(std::filesystem::path target);
    ~DurableFile();
    DurableFile(const DurableFile&) = delete;
    DurableFile& operator=(const DurableFile&) = delete;

    void write(const void* data, size_t bytes);
    void write_at(uint64_t position, const void* data, size_t bytes);
    void flush();
    void commit();
    const std::filesystem::path& temporary() const { return temporary_; }

private:
    [[noreturn]] void refuse() const;

    std::filesystem::path target_, temporary_;
    std::FILE* file_ = nullptr;
};

void write_durably(const std::filesystem::path& target, std::string_view content);
// The content of a small file. Throws Error (io).
std::string read_text(const std::filesystem::path& path);

}  // namespace ssm
