// The one exception of the library: a code for programs, a line for people.
//
// Message form: "[where] what is wrong", where `where` is an operator, a file format or a file name:
//   [selective_scan] `A` must be [d n] = [128, 16] but is [16, 128]
// Thrown at doors only: argument checks, files, options. Kernels are noexcept.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace ssm {

enum class ErrorCode {
    invalid_argument,  // the caller passed something wrong: shapes, options, prompts
    bad_file,          // a file's content is malformed, truncated or contradicts itself
    io,                // the operating system refused: missing, unreadable, full
    unsupported,       // well formed, but this build or this machine cannot do it
    numeric,           // NaN or Inf where there must be none
};

class Error : public std::runtime_error {
public:
    Error(ErrorCode code, std::string_view where, std::string_view what)
        : std::runtime_error(fmt::format("[{}] {}", where, what)), code_(code) {}
    ErrorCode code() const noexcept { return code_; }

private:
    ErrorCode code_;
};

// Throws Error{code, "[where] formatted"}.
template <class... Args>
[[noreturn]] void fail(ErrorCode code, std::string_view where, fmt::format_string<Args...> format,
                       Args&&... args) {
    throw Error(code, where, fmt::format(format, std::forward<Args>(args)...));
}

// fail(invalid_argument, ...) unless `condition`.
template <class... Args>
void require(bool condition, std::string_view where, fmt::format_string<Args...> format, Args&&... args) {
    if (!condition) fail(ErrorCode::invalid_argument, where, format, std::forward<Args>(args)...);
}

}  // namespace ssm
