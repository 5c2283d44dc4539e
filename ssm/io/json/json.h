// JSON out of files that are not trusted. Private to the library (public headers do not expose nlohmann's).
//
// parse_json is stricter than nlohmann::json::parse: nesting and size are limited, a key that appears twice
// is an error. It is wider in one point: the numbers that JSON lacks, in both spellings found in Hugging Face
// files, the bare tokens Infinity, -Infinity, NaN (Python's json) and {"__float__": "Infinity"}
// (transformers 5), become floating point numbers.
// Errors (code bad_file), one line: "[where] NAME: not valid JSON at byte 17: ...".
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace ssm {

struct JsonOptions {
    std::string_view name = {};  // of the file, for messages; may be empty
    size_t max_depth = 64;
    size_t max_bytes = size_t{256} << 20;
};

nlohmann::json parse_json(std::string_view text, std::string_view where, const JsonOptions& options = {});

// The one line that a parser's complaint becomes; for handlers that take nlohmann's events directly.
std::string json_error_line(const JsonOptions& options, size_t byte, std::string_view complaint);

}  // namespace ssm
