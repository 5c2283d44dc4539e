// Text of unknown origin (names out of files, paths) made fit for a one-line message: printable ASCII and
// valid-looking UTF-8 bytes stay, control characters become '?', and what is long is cut.
#pragma once

#include <string>
#include <string_view>

namespace ssm {

inline std::string printable(std::string_view text, size_t limit = 100) {
    std::string out;
    for (char c : text.substr(0, limit)) {
        const auto u = static_cast<unsigned char>(c);
        out += u < 0x20 || u == 0x7f ? '?' : c;
    }
    if (text.size() <= limit) return out;
    while (!out.empty() && (static_cast<unsigned char>(out.back()) & 0xc0) == 0x80) out.pop_back();
    if (!out.empty() && static_cast<unsigned char>(out.back()) >= 0xc0) out.pop_back();
    return out + "...";
}

}  // namespace ssm
