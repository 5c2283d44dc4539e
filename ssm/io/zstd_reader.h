// A text file as a stream, plain or compressed with zstd (told apart by its first bytes): any size in
// constant memory, pipes too. Several frames one after the other are one text.
//
// Errors  io        "[file] PATH: does not exist" and the like
//         bad_file  "[zstd] PATH: truncated: the file ends inside a frame"
//                   "[zstd] PATH: damaged after byte N: Restored data doesn't match checksum"
//                   "[zstd] PATH: is not zstd data"  (when the name ends in .zst)
//                   "[text] PATH: line N is longer than M bytes"
// Memory  two buffers of 256 KiB, the window of the frame (frames that need more than 128 MiB are
//         refused), and the line asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

struct ZSTD_DCtx_s;

namespace ssm {

class ZstdReader {
public:
    explicit ZstdReader(std::filesystem::path path);
    ~ZstdReader();
    ZstdReader(const ZstdReader&) = delete;
    ZstdReader& operator=(const ZstdReader&) = delete;

    // The next bytes of the text, at most to.size(); 0 only at the end.
    size_t read(std::span<char> to);
    // The next line without its "\n"; false at the end. A last line need not end.
    bool line(std::string& to, size_t max_bytes = size_t{256} << 20);
    uint64_t lines() const { return lines_; }  // given out so far

private:
    bool fill();      // more text into out_; false at the end
    bool fill_raw();  // more of the file into in_; false at the end
    size_t read_file(std::span<char> to);
    void detect();
    [[noreturn]] void fail_zstd(std::string_view what) const;

    struct FreeDecoder {
        void operator()(ZSTD_DCtx_s* decoder) const noexcept;
    };

    std::filesystem::path path_;
    int fd_ = -1;
    std::unique_ptr<ZSTD_DCtx_s, FreeDecoder> decoder_;
    std::unique_ptr<char[]> in_, out_;
    size_t in_begin_ = 0, in_end_ = 0, out_begin_ = 0, out_end_ = 0;
    bool in_frame_ = false;
    uint64_t lines_ = 0, consumed_ = 0 /* bytes of the file */;
};

// A whole text. Errors as above, and "[text] PATH: is longer than M bytes".
std::string read_whole_text(const std::filesystem::path& path, size_t max_bytes = size_t{1} << 30);

}  // namespace ssm
