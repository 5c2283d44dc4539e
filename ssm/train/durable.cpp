#include "ssm/train/durable.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "ssm/core/error.h"

namespace ssm {
namespace fs = std::filesystem;

void make_directories(const fs::path& folder) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) fail(ErrorCode::io, "files", "cannot create `{}`: {}", folder.string(), error.message());
    if (!fs::is_directory(folder, error)) {
        fail(ErrorCode::io, "files", "`{}` is not a folder", folder.string());
    }
}

void sync_path(const fs::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const bool good = fd >= 0 && ::fsync(fd) == 0;
    const int reason = errno;
    if (fd >= 0) ::close(fd);
    if (!good) fail(ErrorCode::io, "files", "cannot sync `{}`: {}", path.string(), std::strerror(reason));
}

void durable_rename(const fs::path& from, const fs::path& to) {
    std::error_code error;
    fs::rename(from, to, error);
    if (error) {
        fail(ErrorCode::io, "files", "cannot rename `{}` to `{}`: {}", from.string(), to.string(),
             error.message());
    }
    sync_path(to.has_parent_path() ? to.parent_path() : fs::path("."));
}

DurableFile::DurableFile(fs::path target) : target_(std::move(target)) {
    temporary_ = target_.string() + fmt::format(".tmp-{}", ::getpid());
    file_ = std::fopen(temporary_.c_str(), "wb");
    if (file_ == nullptr) refuse();
}

DurableFile::~DurableFile() {
    if (file_ == nullptr) return;
    std::fclose(file_);
    ::unlink(temporary_.c_str());
}

void DurableFile::refuse() const {
    fail(ErrorCode::io, "files", "cannot write `{}`: {}", target_.string(), std::strerror(errno));
}

void DurableFile::write(const void* data, size_t bytes) {
    if (bytes != 0 && std::fwrite(data, 1, bytes, file_) != bytes) refuse();
}

void DurableFile::write_at(uint64_t position, const void* data, size_t bytes) {
    if (::fseeko(file_, static_cast<off_t>(position), SEEK_SET) != 0) refuse();
    write(data, bytes);
}

void DurableFile::flush() {
    if (std::fflush(file_) != 0) refuse();
}

void DurableFile::commit() {
    flush();
    if (::fsync(::fileno(file_)) != 0) refuse();
    const bool closed = std::fclose(file_) == 0;
    file_ = nullptr;
    if (!closed) {
        ::unlink(temporary_.c_str());
        refuse();
    }
    durable_rename(temporary_, target_);
}

void write_durably(const fs::path& target, std::string_view content) {
    DurableFile f(target);
    f.write(content.data(), content.size());
    f.commit();
}

std::string read_text(const fs::path& path) {
    std::FILE* f = std::fopen(path.c_str(), "rb");
    if (f == nullptr) fail(ErrorCode::io, "files", "cannot read `{}`: {}", path.string(), std::strerror(errno));
    std::string text;
    char block[65536];
    size_t n = 0;
    while ((n = std::fread(block, 1, sizeof block, f)) > 0) text.append(block, n);
    const bool good = std::ferror(f) == 0;
    std::fclose(f);
    if (!good) fail(ErrorCode::io, "files", "cannot read `{}`", path.string());
    return text;
}

}  // namespace ssm
