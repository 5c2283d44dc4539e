// Generator: samples from a Session until a limit, an end-of-text token or a stop string.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ssm/generate/session.h"
#include "ssm/io/tokenizer/tokenizer.h"

namespace ssm {

struct GenerateOptions {
    int64_t max_tokens = 256;
    std::vector<std::string> stop;  // text ends before the first of these; needs a tokenizer
    bool ignore_eos = false;
};

struct Generated {
    std::vector<int32_t> ids;  // the new ones, an end-of-text token included
    std::string text;          // of these ids, special tokens left out, cut at a stop string
    enum class Reason { length, eos, stop } reason = Reason::length;
    double seconds = 0;  // of decoding
};

// Continues `session`, whose prompt has been consumed. `tokenizer` may be null (then no text). `on_text`
// receives the text piece by piece: whole UTF-8 characters, nothing that could still become part of a stop
// string. Every generated token has been consumed afterwards, so the session can be saved and continued.
Generated generate(Session& session, Sampler& sampler, const Tokenizer* tokenizer, const LanguageModel& model,
                   const GenerateOptions& options, const std::function<void(const std::string&)>& on_text);

// Splits a stream of text at stop strings: push() returns what may be shown.
class StopFilter {
public:
    explicit StopFilter(std::vector<std::string> stop) : stop_(std::move(stop)) {}
    std::string push(const std::string& piece);
    std::string flush();  // what was held back
    bool stopped() const { return stopped_; }

private:
    std::vector<std::string> stop_;
    std::string held_;
    bool stopped_ = false;
};

}  // namespace ssm
