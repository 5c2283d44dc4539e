// Session: one sequence being read and continued. Memory does not grow with its length, but for the history
// of ids (4 bytes a token) that the repetition penalty and a saved state need.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "ssm/generate/decoder.h"
#include "ssm/ops/sample/sample.h"

namespace ssm {

class Session {
public:
    // `states`: as of a Decoder.
    Session(const Exec& ex, LanguageModel& model, DType states = DType::f32);

    // Feeds tokens: one by one as steps, many in chunks of kPrefillChunk. Afterwards logits() are those of
    // the last one. Throws Error(invalid_argument) for an id outside the vocabulary, before any state has
    // changed.
    void consume(std::span<const int32_t> ids);
    // Of the next token; throws when nothing was consumed yet.
    std::span<const float> logits() const;
    // The next id by `sampler`, of the first `valid`: on a GPU chosen there, as soon as the logits are. The
    // sampler's draws are counted up; nothing is consumed.
    int32_t sample(Sampler& sampler, int64_t valid);
    const std::vector<int32_t>& history() const { return history_; }
    size_t state_bytes() const { return decoder_.state_bytes_per_slot(); }

    // State (always f32), last logits, history and the sampler's position as one safetensors file. load()
    // throws Error(bad_file) for a file of another model.
    void save(const std::filesystem::path& file, const Sampler& sampler);
    void load(const std::filesystem::path& file, Sampler& sampler);

    static constexpr int64_t kPrefillChunk = Decoder::kPrefillChunk;

private:
    const Exec& exec_;
    LanguageModel& model_;
    Decoder decoder_;                         // of one slot
    std::optional<SamplerOptions> sampling_;  // what the GPU's choices were made by
    uint64_t draws_ = 0;                      // and its draws so far
    std::optional<int32_t> chosen_;           // what it would be fed next
    mutable Tensor logits_;                   // in host memory; absent: not fetched yet
    std::vector<int32_t> history_;
};

}  // namespace ssm
