#include "ssm/train/documents.h"

#include <zstd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm {
namespace {

constexpr size_t kBlock = size_t{1} << 18;

struct CloseFile {
    void operator()(std::FILE* f) const { std::fclose(f); }
};
struct FreeStream {
    void operator()(ZSTD_DStream* s) const { ZSTD_freeDStream(s); }
};

}  // namespace

// Lines of a file that may be compressed.
class DocumentReader::Lines {
public:
    Lines(const std::filesystem::path& path, bool compressed)
        : path_(path), file_(std::fopen(path.c_str(), "rb")), input_(kBlock) {
        if (!file_)
            fail(ErrorCode::io, "corpus", "cannot read `{}`: {}", path.string(), std::strerror(errno));
        if (compressed) {
            stream_.reset(ZSTD_createDStream());
            if (!stream_) fail(ErrorCode::io, "corpus", "cannot allocate a zstd stream");
        }
    }

    // Without the line feed; false at the end. `closed` tells whether a line feed followed.
    bool next(std::string& line, bool& closed) {
        line.clear();
        for (;;) {
            if (at_ == text_.size() && !fill()) {
                closed = false;
                return !line.empty();
            }
            const char* begin = text_.data() + at_;
            const auto* end = static_cast<const char*>(std::memchr(begin, '\n', text_.size() - at_));
            const size_t count = end != nullptr ? static_cast<size_t>(end - begin) : text_.size() - at_;
            line.append(begin, count);
            at_ += count;
            if (end != nullptr) {
                ++at_;
                ++number_;
                closed = true;
                return true;
            }
        }
    }
    int64_t number() const { return number_; }

private:
    size_t read(void* to, size_t size) {
        const size_t n = std::fread(to, 1, size, file_.get());
        if (n < size && std::ferror(file_.get()) != 0) {
            fail(ErrorCode::io, "corpus", "cannot read `{}`: {}", path_.string(), std::strerror(errno));
        }
        return n;
    }
    bool fill() {
        at_ = 0;
        text_.resize(kBlock);
        if (!stream_) {
            text_.resize(read(text_.data(), kBlock));
            return !text_.empty();
        }
        ZSTD_outBuffer out{text_.data(), kBlock, 0};
        while (out.pos == 0) {
            if (in_.pos == in_.size) {
                in_ = {input_.data(), read(input_.data(), kBlock), 0};
                if (in_.size == 0) break;
            }
            pending_ = ZSTD_decompressStream(stream_.get(), &out, &in_);
            if (ZSTD_isError(pending_) != 0) {
                fail(ErrorCode::bad_file, "corpus", "`{}` is not sound zstd: {}", path_.string(),
                     ZSTD_getErrorName(pending_));
            }
        }
        if (out.pos == 0 && pending_ != 0) {
            fail(ErrorCode::bad_file, "corpus", "`{}` is truncated: a zstd frame has no end", path_.string());
        }
        text_.resize(out.pos);
        return !text_.empty();
    }

    std::filesystem::path path_;
    std::unique_ptr<std::FILE, CloseFile> file_;
    std::unique_ptr<ZSTD_DStream, FreeStream> stream_;
    std::vector<char> input_, text_;
    ZSTD_inBuffer in_{nullptr, 0, 0};
    size_t pending_ = 0;  // what zstd still expects of the current frame
    size_t at_ = 0;
    int64_t number_ = 0;
};

DocumentReader::DocumentReader(std::filesystem::path path, DocumentOptions options)
    : path_(std::move(path)), options_(std::move(options)) {
    const bool compressed = path_.extension() == ".zst";
    const auto kind = (compressed ? path_.stem() : path_).extension();
    require(kind == ".txt" || kind == ".jsonl", "corpus",
            "`{}` must end in .txt or .jsonl, optionally followed by .zst", path_.string());
    require(!options_.separator.empty(), "corpus", "the document separator is empty");
    json_ = kind == ".jsonl";
    lines_ = std::make_unique<Lines>(path_, compressed);
}

DocumentReader::~DocumentReader() = default;

bool DocumentReader::next(std::string& document) {
    do {
        if (!(json_ ? next_json(document) : next_text(document))) return false;
    } while (document.empty());
    ++number_;
    require_utf8(document);
    return true;
}

bool DocumentReader::next_text(std::string& document) {
    document.clear();
    std::string line;
    bool any = false, closed = false;
    while (lines_->next(line, closed)) {
        any = true;
        std::string_view content = line;
        if (!content.empty() && content.back() == '\r') content.remove_suffix(1);
        if (content == options_.separator) break;
        document += line;
        if (closed) document += '\n';
    }
    if (!document.empty() && document.back() == '\n') document.pop_back();
    if (!document.empty() && document.back() == '\r') document.pop_back();
    return any;
}

bool DocumentReader::next_json(std::string& document) {
    std::string line;
    bool closed = false;
    do {
        if (!lines_->next(line, closed)) return false;
    } while (line.find_first_not_of(" \t\r") == std::string::npos);
    const int64_t number = lines_->number() + (closed ? 0 : 1);
    const auto object = nlohmann::json::parse(line, nullptr, false);
    const auto field = object.is_object() ? object.find(options_.field) : object.end();
    if (!object.is_object() || field == object.end() || !field->is_string()) {
        fail(ErrorCode::bad_file, "corpus", "{}:{}: not a JSON object with a string \"{}\"", path_.string(),
             number, options_.field);
    }
    document = field->get<std::string>();
    return true;
}

void DocumentReader::require_utf8(const std::string& document) const {
    const size_t bad = tokenizer::first_invalid_utf8(document);
    if (bad == std::string::npos) return;
    fail(ErrorCode::bad_file, "corpus", "`{}`: document {} is not UTF-8 at its byte {} (0x{:02x})",
         path_.string(), number_, bad, static_cast<unsigned char>(document[bad]));
}

}  // namespace ssm
