// Reads the documents of a text file one by one, in constant memory (one document at a time).
//
//   NAME.txt    each document is followed by a line that is exactly the separator; the line breaks around
//               that line belong to it. Text after the last separator is a document too.
//   NAME.jsonl  one JSON object a line; the document is its string `field`.
//   either followed by .zst (zstd, decompressed as it is read; several frames are one stream: zstd_reader.h)
//
// Documents are UTF-8 (checked); empty ones are skipped. A line has at most 256 MiB. A Windows line end
// before or after a separator and at the end of a JSON line is understood.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

namespace ssm {

class ZstdReader;

struct DocumentOptions {
    std::string separator = "<|endoftext|>";
    std::string field = "text";
};

class DocumentReader {
public:
    // Throws Error: io when the file cannot be read, bad_file when a .zst is not zstd, invalid_argument for
    // another extension.
    DocumentReader(std::filesystem::path path, DocumentOptions options);
    ~DocumentReader();
    DocumentReader(const DocumentReader&) = delete;
    DocumentReader& operator=(const DocumentReader&) = delete;

    // The next document; false at the end. Throws bad_file: broken zstd, JSON or UTF-8, with the line or the
    // document's number.
    bool next(std::string& document);

private:
    bool next_text(std::string& document);
    bool next_json(std::string& document);
    void require_utf8(const std::string& document) const;

    std::filesystem::path path_;
    DocumentOptions options_;
    bool json_ = false;
    std::unique_ptr<ZstdReader> lines_;
    int64_t number_ = 0;  // documents given so far
};

}  // namespace ssm
