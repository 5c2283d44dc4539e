#include "ssm/io/mapped_file.h"

#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ssm/core/error.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

[[noreturn]] void fail_file(const std::filesystem::path& path, std::string_view what) {
    fail(ErrorCode::io, "file", "{}: {}", printable(path.string(), 400), what);
}
[[noreturn]] void fail_system(const std::filesystem::path& path, int error) {
    if (error == ENOENT || error == ENOTDIR) fail_file(path, "does not exist");
    fail_file(path, fmt::format("cannot be read: {}", std::strerror(error)));
}

// A file descriptor that closes itself, and the size of the regular file behind it.
class OpenFile {
public:
    explicit OpenFile(const std::filesystem::path& path) : path_(path) {
        fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd_ < 0) fail_system(path, errno);
        struct stat status {};
        if (::fstat(fd_, &status) != 0) close_and_fail(errno);
        const bool regular = S_ISREG(status.st_mode), directory = S_ISDIR(status.st_mode);
        if (!regular) ::close(fd_);
        if (directory) fail_file(path, "is a directory");
        if (!regular) fail_file(path, "is not a regular file");
        size_ = static_cast<size_t>(status.st_size);
    }
    ~OpenFile() { ::close(fd_); }
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    int fd() const { return fd_; }
    size_t size() const { return size_; }

    void read_all(std::byte* to) const {
        for (size_t done = 0; done < size_;) {
            const ssize_t got = ::read(fd_, to + done, size_ - done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail_system(path_, errno);
            if (got == 0) fail_file(path_, "became shorter while it was read");
            done += static_cast<size_t>(got);
        }
    }

private:
    [[noreturn]] void close_and_fail(int error) const {
        ::close(fd_);
        fail_system(path_, error);
    }

    const std::filesystem::path& path_;
    int fd_ = -1;
    size_t size_ = 0;
};

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path, Access access) {
    const OpenFile file(path);
    if (file.size() == 0) fail_file(path, "is empty");
    std::shared_ptr<MappedFile> result(new MappedFile);
    result->path_ = path;
    if (access == Access::map) {
        void* p = ::mmap(nullptr, file.size(), PROT_READ, MAP_SHARED, file.fd(), 0);
        if (p != MAP_FAILED) {
            result->mapped_ = true;
            result->bytes_ = {static_cast<const std::byte*>(p), file.size()};
            return result;
        }
    }
    result->copy_ = std::make_unique_for_overwrite<std::byte[]>(file.size());
    file.read_all(result->copy_.get());
    result->bytes_ = {result->copy_.get(), file.size()};
    return result;
}

MappedFile::~MappedFile() {
    if (mapped_) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

std::string read_text_file(const std::filesystem::path& path, size_t max_bytes) {
    const OpenFile file(path);
    if (file.size() > max_bytes) {
        fail_file(path, fmt::format("has {} bytes; at most {} are read", file.size(), max_bytes));
    }
    std::string text(file.size(), '\0');
    file.read_all(reinterpret_cast<std::byte*>(text.data()));
    return text;
}

}  // namespace ssm
