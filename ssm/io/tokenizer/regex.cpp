#include "ssm/io/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

namespace {

constexpr size_t kMaxPattern = 16384;         // bytes
constexpr uint32_t kHeapLimit = 64 * 1024;    // KiB, interpreter only
constexpr size_t kWindow = 4096;              // start positions tried between two looks at the clock
constexpr std::chrono::seconds kMaxTime{10};  // of one search

pcre2_code* code_of(void* p) { return static_cast<pcre2_code*>(p); }
pcre2_match_data* data_of(void* p) { return static_cast<pcre2_match_data*>(p); }
pcre2_match_context* context_of(void* p) { return static_cast<pcre2_match_context*>(p); }
pcre2_jit_stack* stack_of(void* p) { return static_cast<pcre2_jit_stack*>(p); }

// A run of n characters may need a few n steps; nothing honest needs much more.
uint32_t match_limit(size_t text_size) {
    return static_cast<uint32_t>(std::min<size_t>(20'000 + 16 * text_size, 1'000'000'000));
}

}  // namespace

RegexScratch::RegexScratch()
    : match_data_(pcre2_match_data_create(1, nullptr)), match_context_(pcre2_match_context_create(nullptr)) {
    pcre2_set_heap_limit(context_of(match_context_), kHeapLimit);
}

RegexScratch::~RegexScratch() {
    pcre2_match_data_free(data_of(match_data_));
    pcre2_match_context_free(context_of(match_context_));
    pcre2_jit_stack_free(stack_of(jit_stack_));
}

Regex::Regex(std::string_view pattern) : pattern_(pattern) {
    if (pattern.size() > kMaxPattern)
        fail(ErrorCode::bad_file, "tokenizer", "a pattern of {} bytes is longer than {}", pattern.size(),
             kMaxPattern);
    const std::string translated = translate_pattern(pattern);
    auto* context = pcre2_compile_context_create(nullptr);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int error = 0;
    size_t at = 0;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C |
                              PCRE2_NO_AUTO_CAPTURE | PCRE2_USE_OFFSET_LIMIT,
                          &error, &at, context);
    pcre2_compile_context_free(context);
    if (code_ == nullptr) {
        PCRE2_UCHAR message[128] = {};
        pcre2_get_error_message(error, message, sizeof message);
        fail(ErrorCode::bad_file, "tokenizer", "pattern {} does not compile: {}", shown(pattern),
             reinterpret_cast<const char*>(message));
    }
    pcre2_jit_compile(code_of(code_), PCRE2_JIT_COMPLETE);  // if refused, the interpreter is used
}

Regex::~Regex() { pcre2_code_free(code_of(code_)); }

Regex::Regex(Regex&& other) noexcept
    : code_(std::exchange(other.code_, nullptr)), pattern_(std::move(other.pattern_)) {}

bool Regex::find(std::string_view text, size_t from, RegexScratch& scratch, Span& match) const {
    auto* context = context_of(scratch.match_context_);
    auto* data = data_of(scratch.match_data_);
    pcre2_set_match_limit(context, match_limit(text.size() - from));
    std::chrono::steady_clock::time_point start;
    for (size_t begin = from;;) {
        const size_t last = text.size() - begin > kWindow ? begin + kWindow : text.size();
        pcre2_set_offset_limit(context, last);
        int code = pcre2_match(code_of(code_), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), begin,
                               PCRE2_NO_UTF_CHECK, data, context);
        if (code == PCRE2_ERROR_JIT_STACKLIMIT && scratch.jit_stack_ == nullptr) {
            scratch.jit_stack_ = pcre2_jit_stack_create(256 * 1024, 64 * 1024 * 1024, nullptr);
            pcre2_jit_stack_assign(context, nullptr, scratch.jit_stack_);
            if (scratch.jit_stack_ != nullptr) continue;
        }
        if (code >= 0) {
            const size_t* found = pcre2_get_ovector_pointer(data);
            match = {found[0], found[1]};
            return true;
        }
        if (code != PCRE2_ERROR_NOMATCH) fail_match(code, begin);
        if (last == text.size()) return false;
        begin = next_character(text, last);
        if (start == std::chrono::steady_clock::time_point{})
            start = std::chrono::steady_clock::now();
        else if (std::chrono::steady_clock::now() - start > kMaxTime)
            fail_match(PCRE2_ERROR_MATCHLIMIT, begin);
    }
}

size_t Regex::next_character(std::string_view text, size_t at) {
    ++at;
    while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) ++at;
    return at;
}

void Regex::fail_match(int code, size_t at) const {
    PCRE2_UCHAR message[128] = {};
    pcre2_get_error_message(code, message, sizeof message);
    fail(ErrorCode::invalid_argument, "tokenizer", "pattern {} gives up at byte {} of a piece: {}",
         shown(pattern_), at, reinterpret_cast<const char*>(message));
}

}  // namespace ssm::tokenizer
