// Which tokens a training step sees, as a pure function of (seed, epoch, position): resuming is a counter.
//
// Windows   every file is cut into windows of `length` predicted tokens; an epoch visits each file's windows
//           `weight` times. The cuts shift by a random offset from one pass over a file to the next.
// Packed    every document (with its end) is cut into pieces of at most `length`; a step takes pieces up to
//           batch * length tokens. Documents never see each other; each starts from the end-of-document id.
//
// The order within an epoch is a permutation of [0, n): a Feistel network of four rounds on the next even
// power of two, walked until it falls below n (Black & Rogaway 2002, cycle walking). O(1) memory, O(1) time.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ssm/train/batch_source.h"
#include "ssm/train/token_file.h"

namespace ssm {

// Bijection of [0, n), n >= 1, chosen by `key`.
class Permutation {
public:
    Permutation(uint64_t n, uint64_t key);
    uint64_t operator()(uint64_t i) const;

private:
    uint64_t n_, key_;
    int half_bits_;
};

struct WeightedFile {
    TokenFile tokens;
    double weight = 1.0;  // passes over the file in an epoch; 0.5: another half each time
};

struct BatchSamplerOptions {
    int64_t length = 512, batch = 4;
    uint64_t seed = 0;
    bool packed = false;
};

class BatchSampler final : public BatchSource {
public:
    // Throws when a file has no window of `length` tokens.
    BatchSampler(std::vector<WeightedFile> files, BatchSamplerOptions options);

    void next(Batch& batch) override;
    SamplerState state() const override { return state_; }
    void seek(SamplerState state) override;
    uint64_t epoch_size() const override { return epoch_size_; }  // windows or pieces
    int64_t tokens_per_batch() const override { return options_.batch * options_.length; }
    std::map<std::string, std::string> identity() const override;
    int64_t epoch_tokens() const { return epoch_tokens_; }

private:
    struct File {
        WeightedFile source;
        uint64_t items, per_epoch;     // windows or pieces; how many of them an epoch visits
        std::vector<uint64_t> pieces;  // packed: before each document, [documents+1]
    };
    struct Range {
        const TokenFile* tokens;
        int64_t begin, count;  // the predicted positions
    };
    Range range(uint64_t position) const;
    Range item(const File& file, uint64_t visit) const;
    void advance();

    std::vector<File> files_;
    BatchSamplerOptions options_;
    SamplerState state_;
    uint64_t epoch_size_ = 0;
    int64_t epoch_tokens_ = 0;
};

// Consecutive windows in order, for validation: at most `max_tokens` predictions of the files one after
// another (0: all), the last window of a file may be shorter.
class SequentialWindows {
public:
    SequentialWindows(const std::vector<WeightedFile>& files, int64_t length, int64_t batch,
                      int64_t max_tokens);
    bool next(Batch& batch);

private:
    const std::vector<WeightedFile>& files_;
    int64_t length_, batch_, left_;
    size_t file_ = 0;
    int64_t position_ = 1;
};

}  // namespace ssm
