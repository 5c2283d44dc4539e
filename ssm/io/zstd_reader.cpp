#include "ssm/io/zstd_reader.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "ssm/core/error.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

constexpr size_t kBuffer = size_t{256} << 10;
constexpr size_t kMagicBytes = 4;

[[noreturn]] void fail_system(const std::filesystem::path& path, int error) {
    const bool absent = error == ENOENT || error == ENOTDIR;
    fail(ErrorCode::io, "file", "{}: {}", printable(path.string(), 400),
         absent            ? "does not exist"
         : error == EISDIR ? "is a directory"
                           : fmt::format("cannot be read: {}", std::strerror(error)));
}

// Of a frame, or of a frame to skip.
bool is_zstd(std::string_view start) {
    if (start.size() < kMagicBytes) return false;
    uint32_t magic = 0;
    for (size_t i = 0; i < kMagicBytes; ++i)
        magic |= uint32_t{static_cast<unsigned char>(start[i])} << (8 * i);
    return magic == ZSTD_MAGICNUMBER || (magic & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START;
}

}  // namespace

void ZstdReader::FreeDecoder::operator()(ZSTD_DCtx_s* decoder) const noexcept { ZSTD_freeDCtx(decoder); }

ZstdReader::ZstdReader(std::filesystem::path path) : path_(std::move(path)) {
    in_ = std::make_unique_for_overwrite<char[]>(kBuffer);
    out_ = std::make_unique_for_overwrite<char[]>(kBuffer);
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) fail_system(path_, errno);
    try {
        struct stat status {};
        if (::fstat(fd_, &status) != 0) fail_system(path_, errno);
        if (S_ISDIR(status.st_mode)) fail_system(path_, EISDIR);
        detect();
    } catch (...) {
        ::close(fd_);
        throw;
    }
}

ZstdReader::~ZstdReader() { ::close(fd_); }

void ZstdReader::fail_zstd(std::string_view what) const {
    fail(ErrorCode::bad_file, "zstd", "{}: {}", printable(path_.string(), 400), what);
}

// Reads the first bytes, from a pipe perhaps one by one, and decides what they are.
void ZstdReader::detect() {
    while (in_end_ < kMagicBytes) {
        const size_t got = read_file({in_.get() + in_end_, kBuffer - in_end_});
        if (got == 0) break;
        in_end_ += got;
    }
    if (is_zstd({in_.get(), in_end_})) {
        decoder_.reset(ZSTD_createDCtx());
        if (!decoder_) fail(ErrorCode::io, "zstd", "out of memory");
    } else if (path_.extension() == ".zst") {
        fail_zstd("is not zstd data");
    }
}

size_t ZstdReader::read_file(std::span<char> to) {
    for (;;) {
        const ssize_t got = ::read(fd_, to.data(), to.size());
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail_system(path_, errno);
        consumed_ += static_cast<uint64_t>(got);
        return static_cast<size_t>(got);
    }
}

bool ZstdReader::fill_raw() {
    in_begin_ = 0;
    in_end_ = read_file({in_.get(), kBuffer});
    return in_end_ > 0;
}

bool ZstdReader::fill() {
    out_begin_ = out_end_ = 0;
    if (!decoder_) {
        if (in_begin_ == in_end_ && !fill_raw()) return false;
        std::swap(in_, out_);
        out_begin_ = std::exchange(in_begin_, 0);
        out_end_ = std::exchange(in_end_, 0);
        return true;
    }
    while (out_end_ == 0) {
        if (in_begin_ == in_end_ && !fill_raw()) {
            if (in_frame_) fail_zstd("truncated: the file ends inside a frame");
            return false;
        }
        // At the end of a frame the decoder leaves a byte of input until all of its text is out.
        ZSTD_inBuffer in{in_.get(), in_end_, in_begin_};
        ZSTD_outBuffer out{out_.get(), kBuffer, 0};
        const size_t left = ZSTD_decompressStream(decoder_.get(), &out, &in);
        if (ZSTD_isError(left) != 0) {
            fail_zstd(fmt::format("damaged after byte {}: {}", consumed_ - (in_end_ - in.pos),
                                  ZSTD_getErrorName(left)));
        }
        in_begin_ = in.pos;
        out_end_ = out.pos;
        in_frame_ = left != 0;
    }
    return true;
}

size_t ZstdReader::read(std::span<char> to) {
    if (to.empty() || (out_begin_ == out_end_ && !fill())) return 0;
    const size_t n = std::min(to.size(), out_end_ - out_begin_);
    std::memcpy(to.data(), out_.get() + out_begin_, n);
    out_begin_ += n;
    return n;
}

bool ZstdReader::line(std::string& to, size_t max_bytes) {
    to.clear();
    bool any = false, ended = false;
    while (!ended && (out_begin_ < out_end_ || fill())) {
        any = true;
        const char* begin = out_.get() + out_begin_;
        const size_t have = out_end_ - out_begin_;
        const void* newline = std::memchr(begin, '\n', have);
        const size_t n =
            newline != nullptr ? static_cast<size_t>(static_cast<const char*>(newline) - begin) : have;
        ended = newline != nullptr;
        if (n > max_bytes - to.size()) {
            fail(ErrorCode::bad_file, "text", "{}: line {} is longer than {} bytes",
                 printable(path_.string(), 400), lines_ + 1, max_bytes);
        }
        to.append(begin, n);
        out_begin_ += n + (ended ? 1 : 0);
    }
    lines_ += any ? 1 : 0;
    return any;
}

std::string read_whole_text(const std::filesystem::path& path, size_t max_bytes) {
    ZstdReader reader(path);
    std::string text, block(kBuffer, '\0');
    while (const size_t n = reader.read(block)) {
        if (n > max_bytes - text.size())
            fail(ErrorCode::bad_file, "text", "{}: is longer than {} bytes", printable(path.string(), 400),
                 max_bytes);
        text.append(block, 0, n);
    }
    return text;
}

}  // namespace ssm
