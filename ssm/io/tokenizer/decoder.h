// The decoder of a tokenizer.json, as a pipeline that works on one token at a time.
//
// Between steps the text is a sequence of tokens: feed() appends to the current token, end() closes it. Fuse
// and ByteLevel pass text on but close nothing until the end, so what follows them sees one long token.
// A step that cannot know its output yet (Replace over a fused text, a run of byte tokens) holds text back.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "ssm/io/tokenizer/normalizer.h"

namespace ssm::tokenizer {

struct DecoderState {
    struct Step {
        std::string buffer;  // text of the current token not passed on
        std::string bytes;   // ByteLevel: a cut character; ByteFallback: the run of byte tokens
        int64_t tokens = 0;  // closed so far
        int64_t kept = 0;    // Strip: characters taken at the start of this token; -1: done
    };
    std::vector<Step> steps;
    bool any = false;  // a token came
    std::string out;
    RegexScratch scratch;
};

class Decoder {
public:
    explicit Decoder(const nlohmann::json& object);

    void begin(DecoderState& state) const;
    void push(std::string_view token, DecoderState& state) const;
    void finish(DecoderState& state) const;  // state.out then has everything

private:
    struct ByteLevel {};
    struct ByteFallback {};
    struct Fuse {};
    struct Strip {
        std::string content;
        int64_t start, stop;
    };
    struct Replace {
        Pattern pattern;
        std::string by;
    };
    struct Metaspace {
        std::string replacement;
        bool drops_first;
    };
    using Step = std::variant<ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace>;
    struct Feed;
    struct End;
    struct Finish;

    static Step read(const nlohmann::json& step);
    void feed(size_t step, std::string_view text, DecoderState& state) const;
    void end(size_t step, DecoderState& state) const;
    void token(size_t step, std::string_view text, DecoderState& state) const;
    void finish_bytes(size_t step, DecoderState& state) const;

    std::vector<Step> steps_;
    bool joins_with_space_ = false;  // no decoder at all
};

}  // namespace ssm::tokenizer
