// A tokenizer.json from anywhere: parse it, and if it is accepted encode and decode a fixed text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    constexpr std::string_view text =
        "The boat's 12 oars <s></s> e\xCC\x81\xC3\xA9 \xE2\x96\x81 \xF0\x9F\x99\x82\n\n  "
        "x<|endoftext|>aab<0x41>";
    try {
        const auto tokenizer = ssm::Tokenizer::parse({reinterpret_cast<const char*>(data), size});
        const auto ids = tokenizer.encode(text, true);
        ssm::StreamDecoder stream(tokenizer);
        std::string streamed;
        for (const int32_t id : ids) streamed += stream.push(id);
        if (streamed + stream.flush() != tokenizer.decode(ids)) std::abort();
    } catch (const ssm::Error& error) {
        const std::string_view message = error.what();
        if (!message.starts_with("[tokenizer] ") || message.find('\n') != std::string_view::npos)
            std::abort();
    }
    return 0;
}
