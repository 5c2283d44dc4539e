#include "ssm/train/documents.h"

#include <nlohmann/json.hpp>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"
#include "ssm/io/zstd_reader.h"

namespace ssm {

DocumentReader::DocumentReader(std::filesystem::path path, DocumentOptions options)
    : path_(std::move(path)), options_(std::move(options)) {
    const auto kind = (path_.extension() == ".zst" ? path_.stem() : path_).extension();
    require(kind == ".txt" || kind == ".jsonl", "corpus",
            "`{}` must end in .txt or .jsonl, optionally followed by .zst", path_.string());
    require(!options_.separator.empty(), "corpus", "the document separator is empty");
    json_ = kind == ".jsonl";
    lines_ = std::make_unique<ZstdReader>(path_);
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
    bool any = false;
    while (lines_->line(line)) {
        any = true;
        std::string_view content = line;
        if (!content.empty() && content.back() == '\r') content.remove_suffix(1);
        if (content == options_.separator) break;
        document += line;
        document += '\n';
    }
    if (!document.empty() && document.back() == '\n') document.pop_back();
    if (!document.empty() && document.back() == '\r') document.pop_back();
    return any;
}

bool DocumentReader::next_json(std::string& document) {
    std::string line;
    do {
        if (!lines_->line(line)) return false;
    } while (line.find_first_not_of(" \t\r") == std::string::npos);
    const auto object = nlohmann::json::parse(line, nullptr, false);
    const auto field = object.is_object() ? object.find(options_.field) : object.end();
    if (!object.is_object() || field == object.end() || !field->is_string()) {
        fail(ErrorCode::bad_file, "corpus", "{}:{}: not a JSON object with a string \"{}\"", path_.string(),
             lines_->lines(), options_.field);
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
