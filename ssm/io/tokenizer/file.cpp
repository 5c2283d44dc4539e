#include "ssm/io/tokenizer/file.h"

#include <zstd.h>

#include <memory>
#include <string_view>

#include "ssm/core/error.h"
#include "ssm/io/mapped_file.h"

namespace ssm::tokenizer {

namespace {

constexpr size_t kMaxSize = size_t{1} << 30;

std::string decompress(std::string_view packed, const std::string& name) {
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
    const auto file = MappedFile::open(path);
    const std::string_view bytes = file->text();
    if (path.extension() == ".zst") return decompress(bytes, path.string());
    if (bytes.size() > kMaxSize)
        fail(ErrorCode::bad_file, "tokenizer", "{}: larger than {} bytes", path.string(), kMaxSize);
    return std::string(bytes);
}

}  // namespace ssm::tokenizer
