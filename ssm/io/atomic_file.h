// A file that appears whole or not at all: written beside its place as NAME.partial, flushed to the disk,
// then renamed over NAME. Until commit() returns, the old file is untouched; without commit() (an exception,
// a full disk) the partial one is removed. After a kill it stays, and the next writer overwrites it.
//
// Errors (code io): "[file] PATH: cannot be written: No space left on device". A second writer of the same
// file at the same time is refused.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace ssm {

class AtomicFile {
public:
    explicit AtomicFile(std::filesystem::path path);
    ~AtomicFile();
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(std::span<const std::byte> bytes);
    void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
    size_t bytes_written() const { return written_; }
    void commit();

private:
    [[noreturn]] void fail_system(int error) const;
    void discard() noexcept;

    std::filesystem::path path_, partial_;
    int fd_ = -1;
    size_t written_ = 0;
};

// The whole file at once.
void write_file_atomic(const std::filesystem::path& path, std::string_view text);

}  // namespace ssm
