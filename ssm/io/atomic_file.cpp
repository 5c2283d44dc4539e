#include "ssm/io/atomic_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ssm/core/error.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

// False when `path` no longer names the file behind `fd`: another writer finished and renamed it away.
bool still_names(const std::filesystem::path& path, int fd) {
    struct stat a {
    }, b{};
    return ::fstat(fd, &a) == 0 && ::stat(path.c_str(), &b) == 0 && a.st_ino == b.st_ino &&
           a.st_dev == b.st_dev;
}

// Makes a rename durable; best effort, some file systems refuse to sync a folder.
void sync_folder(const std::filesystem::path& folder) noexcept {
    const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)::fsync(fd);
    ::close(fd);
}

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)), partial_(path_) {
    partial_ += ".partial";
    // A device or a pipe would be replaced by a file.
    std::error_code ignored;
    const auto status = std::filesystem::status(path_, ignored);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
        fail(ErrorCode::io, "file", "{}: cannot be written: it is {}", printable(path_.string(), 400),
             std::filesystem::is_directory(status) ? "a directory" : "not a regular file");
    }
    do {
        if (fd_ >= 0) ::close(fd_);
        fd_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (fd_ < 0) fail_system(errno);
        if (::flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            ::close(std::exchange(fd_, -1));
            fail(ErrorCode::io, "file", "{}: is being written by someone else",
                 printable(path_.string(), 400));
        }
    } while (!still_names(partial_, fd_));
    if (::ftruncate(fd_, 0) != 0) {
        const int error = errno;
        discard();
        fail_system(error);
    }
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::discard() noexcept {
    if (fd_ < 0) return;
    ::unlink(partial_.c_str());
    ::close(std::exchange(fd_, -1));
}

void AtomicFile::fail_system(int error) const {
    fail(ErrorCode::io, "file", "{}: cannot be written: {}", printable(path_.string(), 400),
         std::strerror(error));
}

void AtomicFile::write(std::span<const std::byte> bytes) {
    require(fd_ >= 0, "file", "{}: is already closed", printable(path_.string(), 400));
    while (!bytes.empty()) {
        const size_t piece = std::min(bytes.size(), size_t{1} << 30);
        const ssize_t done = ::write(fd_, bytes.data(), piece);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) {
            const int error = errno;
            discard();
            fail_system(error);
        }
        bytes = bytes.subspan(static_cast<size_t>(done));
        written_ += static_cast<size_t>(done);
    }
}

void AtomicFile::commit() {
    require(fd_ >= 0, "file", "{}: is already closed", printable(path_.string(), 400));
    if (::fsync(fd_) != 0 || ::rename(partial_.c_str(), path_.c_str()) != 0) {
        const int error = errno;
        discard();
        fail_system(error);
    }
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0 && errno != EINTR) fail_system(errno);
    sync_folder(path_.parent_path());
}

void write_file_atomic(const std::filesystem::path& path, std::string_view text) {
    AtomicFile file(path);
    file.write(text);
    file.commit();
}

}  // namespace ssm
