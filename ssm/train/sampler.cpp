#include "ssm/train/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "ssm/core/error.h"
#include "ssm/train/hash.h"

namespace ssm {
namespace {

constexpr uint64_t kShiftedWindows = 16;  // a file with fewer windows keeps its cuts

void append_window(const TokenFile& tokens, int64_t begin, int64_t count, Batch& batch) {
    const size_t at = batch.ids.size();
    batch.ids.resize(at + static_cast<size_t>(count));
    batch.targets.resize(at + static_cast<size_t>(count));
    tokens.copy(begin - 1, count, batch.ids.data() + at);
    tokens.copy(begin, count, batch.targets.data() + at);
    batch.cu_seqlens.push_back(batch.tokens());
}

void clear(Batch& batch) {
    batch.ids.clear();
    batch.targets.clear();
    batch.cu_seqlens.assign(1, 0);
}

}  // namespace

Permutation::Permutation(uint64_t n, uint64_t key) : n_(n), key_(key) {
    require(n >= 1, "sampler", "a permutation of nothing");
    half_bits_ = std::max(1, (static_cast<int>(std::bit_width(n - 1)) + 1) / 2);
}

uint64_t Permutation::operator()(uint64_t i) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    do {
        uint64_t left = i >> half_bits_, right = i & mask;
        for (uint64_t round = 0; round < 4; ++round) {
            const uint64_t mixed = left ^ (mix64(key_ ^ mix64(right + (round << 56))) & mask);
            left = right;
            right = mixed;
        }
        i = (left << half_bits_) | right;
    } while (i >= n_);
    return i;
}

BatchSampler::BatchSampler(std::vector<WeightedFile> files, BatchSamplerOptions options) : options_(options) {
    require_batch("sampler", options.batch, options.length);
    require(!files.empty(), "sampler", "no training data");
    const auto length = static_cast<uint64_t>(options.length);
    for (WeightedFile& source : files) {
        require(source.weight > 0 && source.weight <= 1e6, "sampler", "weight {} is not in (0, 1e6]",
                source.weight);
        File f{std::move(source), 0, 0, {}};
        const TokenFile& t = f.source.tokens;
        if (options.packed) {
            for (int64_t d = 0; d < t.documents(); ++d) {
                f.pieces.push_back(f.items);
                f.items += (static_cast<uint64_t>(t.offset(d + 1) - t.offset(d)) + length - 1) / length;
            }
            f.pieces.push_back(f.items);
        } else {
            f.items = static_cast<uint64_t>(t.tokens() - 1) / length;
            require(f.items > 0, "sampler", "a file has {} tokens, fewer than one window of {}", t.tokens(),
                    length);
            if (f.items >= kShiftedWindows) --f.items;  // room for the offset
        }
        f.per_epoch = std::max<uint64_t>(
            1, static_cast<uint64_t>(std::llround(f.source.weight * static_cast<double>(f.items))));
        epoch_size_ += f.per_epoch;
        epoch_tokens_ += options.packed
                             ? static_cast<int64_t>(f.source.weight * static_cast<double>(t.tokens() - 1))
                             : static_cast<int64_t>(f.per_epoch) * options.length;
        files_.push_back(std::move(f));
    }
}

std::map<std::string, std::string> BatchSampler::identity() const {
    return {{"length", std::to_string(options_.length)},
            {"batch", std::to_string(options_.batch)},
            {"seed", std::to_string(options_.seed)},
            {"packed", options_.packed ? "true" : "false"}};
}

void BatchSampler::seek(SamplerState state) {
    require(state.position < epoch_size_, "sampler", "position {} is not in an epoch of {}", state.position,
            epoch_size_);
    state_ = state;
}

// The `visit`-th item that a file gives, over all epochs: passes over the file follow one another.
BatchSampler::Range BatchSampler::item(const File& file, uint64_t visit) const {
    const uint64_t pass = visit / file.items, in_pass = visit % file.items;
    const auto file_key = static_cast<uint64_t>(&file - files_.data());
    const uint64_t key = mix64(options_.seed ^ mix64(file_key + 1));
    const uint64_t i = Permutation(file.items, key)(in_pass);
    const TokenFile& t = file.source.tokens;
    if (!options_.packed) {
        const int64_t slack = t.tokens() - 1 - static_cast<int64_t>(file.items) * options_.length;
        const auto offset =
            file.items + 1 >= kShiftedWindows
                ? static_cast<int64_t>(mix64(key ^ mix64(~pass)) % static_cast<uint64_t>(slack + 1))
                : 0;
        return {&t, 1 + offset + static_cast<int64_t>(i) * options_.length, options_.length};
    }
    const auto above = std::upper_bound(file.pieces.begin(), file.pieces.end(), i);
    const int64_t document = above - file.pieces.begin() - 1;
    const int64_t begin =
        t.offset(document) + static_cast<int64_t>(i - file.pieces[document]) * options_.length;
    return {&t, begin, std::min(options_.length, t.offset(document + 1) - begin)};
}

BatchSampler::Range BatchSampler::range(uint64_t position) const {
    const uint64_t epoch_key = mix64(options_.seed + mix64(state_.epoch));
    uint64_t i = Permutation(epoch_size_, epoch_key)(position);
    size_t f = 0;
    while (i >= files_[f].per_epoch) i -= files_[f++].per_epoch;
    return item(files_[f], state_.epoch * files_[f].per_epoch + i);
}

void BatchSampler::advance() {
    if (++state_.position == epoch_size_) state_ = {state_.epoch + 1, 0};
}

void BatchSampler::next(Batch& batch) {
    clear(batch);
    const int64_t budget = options_.batch * options_.length;
    for (;;) {
        const Range r = range(state_.position);
        if (batch.tokens() + r.count > budget) return;
        append_window(*r.tokens, r.begin, r.count, batch);
        advance();
    }
}

SequentialWindows::SequentialWindows(const std::vector<WeightedFile>& files, int64_t length, int64_t batch,
                                     int64_t max_tokens)
    : files_(files), length_(length), batch_(batch), left_(max_tokens > 0 ? max_tokens : INT64_MAX) {}

bool SequentialWindows::next(Batch& batch) {
    clear(batch);
    for (int64_t i = 0; i < batch_ && left_ > 0; ++i) {
        while (file_ < files_.size() && position_ >= files_[file_].tokens.tokens()) {
            ++file_;
            position_ = 1;
        }
        if (file_ == files_.size()) break;
        const TokenFile& t = files_[file_].tokens;
        const int64_t count = std::min({length_, left_, t.tokens() - position_});
        append_window(t, position_, count, batch);
        position_ += count;
        left_ -= count;
    }
    return batch.tokens() > 0;
}

}  // namespace ssm
