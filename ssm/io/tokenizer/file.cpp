#include "ssm/io/tokenizer/file.h"

#include <zstd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

constexpr size_t kMaxSize = size_t{1} << 30;

std::string decompress(const std::string& packed, const std::string& name) {
    const std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream(ZSTD_createDStream(),
                                                                          ZSTD_freeDStream);
    std::string out, block(ZSTD_DStreamOutSize(), '\0');
    ZSTD_inBuffer in{packed.data(), packed.size(), 0};
    size_t left = 1;
    while (in.pos < in.size || left != 0) {
        ZSTD_outBuffer piece{block.data(), block.size(), 0};
        const size_t before = in.pos;
        left = ZSTD_decompressStream(stream.get(), &piece, &in);
        if (ZSTD_isError(left))
            fail(ErrorCode::bad_file, "tokenizer", "{}: {}", name, ZSTD_getErrorName(left));
        out.append(block, 0, piece.pos);
        if (out.size() > kMaxSize)
            fail(ErrorCode::bad_file, "tokenizer", "{}: larger than {} bytes", name, kMaxSize);
        if (in.pos == before && piece.pos == 0 && left != 0)
            fail(ErrorCode::bad_file, "tokenizer", "{}: the compressed data is cut", name);
    }
    return out;
}

}  // namespace

std::string read_file(const std::filesystem::path& path) {
    const std::string name = path.string();
    std::error_code error;
    if (std::filesystem::is_directory(path, error)) fail(ErrorCode::io, "tokenizer", "{}: is a folder", name);
    errno = 0;
    std::ifstream in(path, std::ios::binary);
    if (!in) fail(ErrorCode::io, "tokenizer", "{}: {}", name, std::strerror(errno != 0 ? errno : EIO));
    const auto size = std::filesystem::file_size(path, error);
    if (!error && size > kMaxSize)
        fail(ErrorCode::bad_file, "tokenizer", "{}: larger than {} bytes", name, kMaxSize);
    std::string data;
    std::string block(1 << 20, '\0');
    while (in.read(block.data(), static_cast<std::streamsize>(block.size())) || in.gcount() > 0) {
        data.append(block, 0, static_cast<size_t>(in.gcount()));
        if (data.size() > kMaxSize)
            fail(ErrorCode::bad_file, "tokenizer", "{}: larger than {} bytes", name, kMaxSize);
    }
    if (in.bad()) fail(ErrorCode::io, "tokenizer", "{}: reading failed", name);
    return path.extension() == ".zst" ? decompress(data, name) : data;
}

}  // namespace ssm::tokenizer
