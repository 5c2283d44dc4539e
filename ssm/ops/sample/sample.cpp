#include "ssm/ops/sample/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ssm/core/error.h"
#include "ssm/core/random.h"
#include "ssm/ops/sample/sample_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "sample";
constexpr float kInf = std::numeric_limits<float>::infinity();

void require_options(const SamplerOptions& o) {
    require(o.temperature >= 0 && o.temperature < kInf, kOp, "temperature must be finite and >= 0 but is {}",
            o.temperature);
    require(o.top_k >= 0, kOp, "top_k must be >= 0 (0: off) but is {}", o.top_k);
    require(o.top_p > 0 && o.top_p <= 1, kOp, "top_p must be in (0, 1] but is {}", o.top_p);
    require(o.min_p >= 0 && o.min_p < 1, kOp, "min_p must be in [0, 1) but is {}", o.min_p);
    require(o.repetition_penalty > 0 && o.repetition_penalty < kInf, kOp,
            "repetition_penalty must be finite and > 0 but is {}", o.repetition_penalty);
}

[[noreturn]] void fail_nan(std::string_view where, std::span<const float> logits) {
    const auto at = std::find_if(logits.begin(), logits.end(), [](float x) { return std::isnan(x); });
    fail(ErrorCode::numeric, where, "the logit of id {} is NaN", at - logits.begin());
}

void require_finite_max(std::span<const float> logits, float max) {
    if (max == -kInf) fail(ErrorCode::numeric, kOp, "all {} logits are -inf", logits.size());
    if (max < kInf) return;
    const auto at = std::find(logits.begin(), logits.end(), kInf);
    fail(ErrorCode::numeric, kOp, "the logit of id {} is inf", at - logits.begin());
}

// 1 / temperature; a temperature below FLT_MIN must not turn 0 * inf into NaN.
float inverse(float temperature) { return std::min(1.0f / temperature, std::numeric_limits<float>::max()); }

int64_t block_count(std::span<const float> x) {
    return (static_cast<int64_t>(x.size()) + cpu::kLogitBlock - 1) / cpu::kLogitBlock;
}

// Calls f(id) for every logit of every block whose maximum is at least `bound`.
template <class F>
void for_each_in_blocks(std::span<const float> logits, const std::vector<float>& maxima, float bound, F&& f) {
    const int64_t n = static_cast<int64_t>(logits.size());
    for (size_t b = 0; b < maxima.size(); ++b) {
        if (!(maxima[b] >= bound)) continue;
        const int64_t first = static_cast<int64_t>(b) * cpu::kLogitBlock;
        const int64_t last = std::min(n, first + cpu::kLogitBlock);
        for (int64_t i = first; i < last; ++i) f(static_cast<int32_t>(i));
    }
}

// Larger logits first, ties to the smaller id.
constexpr auto before = [](const auto& a, const auto& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
};

// The candidate at which the measures of `v`, taken from the largest logit down, reach `target`: a selection
// that follows the half in which it lies, so only the last 32 are sorted.
template <class Candidate, class Measure>
Candidate boundary(std::vector<Candidate>& v, double target, Measure measure) {
    const auto begin = v.begin();
    std::ptrdiff_t low = 0, high = std::ssize(v);
    while (high - low > 32) {
        const std::ptrdiff_t middle = low + (high - low) / 2;
        std::nth_element(begin + low, begin + middle, begin + high, before);
        double sum = 0;
        for (std::ptrdiff_t i = low; i < middle; ++i) sum += measure(begin[i]);
        if (sum >= target) {
            high = middle;
        } else {
            target -= sum;
            low = middle;
        }
    }
    std::sort(begin + low, begin + high, before);
    for (; low + 1 < high; ++low) {
        target -= measure(begin[low]);
        if (target <= 0) break;
    }
    return begin[low];
}

}  // namespace

Sampler::Sampler(SamplerOptions options) : options_(options) { require_options(options_); }

int32_t Sampler::sample(std::span<const float> logits, int64_t valid, std::span<const int32_t> history) {
    require(valid >= 1 && valid <= static_cast<int64_t>(logits.size()), kOp,
            "valid = {} is outside [1, {}], the number of logits", valid, logits.size());
    logits = penalised(logits.first(static_cast<size_t>(valid)), history);
    if (options_.temperature == 0) {
        const cpu::Largest best = cpu::largest(logits.data(), valid);
        if (best.has_nan) fail_nan(kOp, logits);
        require_finite_max(logits, best.value);
        return static_cast<int32_t>(best.index);
    }
    maxima_.resize(static_cast<size_t>(block_count(logits)));
    if (!cpu::block_maxima(logits.data(), valid, maxima_.data())) fail_nan(kOp, logits);
    const float max = *std::max_element(maxima_.begin(), maxima_.end());
    require_finite_max(logits, max);

    // Output number draws_ of splitmix64: its state grows by this constant with each.
    const double u = Random(options_.seed + draws_ * 0x9e3779b97f4a7c15u).uniform();
    const bool all_k = options_.top_k == 0 || options_.top_k >= valid;
    const bool any = all_k && options_.top_p == 1 && options_.min_p == 0;
    const int32_t id = any ? draw_any(logits, max, u) : draw_kept(logits, max, u);
    ++draws_;
    return id;
}

std::span<const float> Sampler::penalised(std::span<const float> logits, std::span<const int32_t> history) {
    const int64_t n = static_cast<int64_t>(logits.size());
    for (const int32_t id : history) {
        require(id >= 0 && id < n, kOp, "the history holds id {}, outside [0, {})", id, n);
    }
    const float r = options_.repetition_penalty;
    if (r == 1 || history.empty()) return logits;
    logits_.assign(logits.begin(), logits.end());
    for (const int32_t id : history) {  // from the original: a token seen twice is penalised once
        const float x = logits[static_cast<size_t>(id)];
        logits_[static_cast<size_t>(id)] = x > 0 ? x / r : x * r;
    }
    return logits_;
}

int32_t Sampler::draw_any(std::span<const float> logits, float max, double u) {
    const int64_t n = static_cast<int64_t>(logits.size());
    weights_.resize(logits.size());
    sums_.resize(maxima_.size());
    cpu::exp_weights(logits.data(), n, max, inverse(options_.temperature), weights_.data());
    cpu::block_sums(weights_.data(), n, sums_.data());
    double total = 0;
    for (const double s : sums_) total += s;
    double left = u * total;
    size_t block = 0;
    while (block + 1 < sums_.size() && left >= sums_[block]) left -= sums_[block++];
    // Rounding may leave a sliver at the end of the block, or an empty last block: then the last positive
    // weight is the answer.
    const size_t first = block * static_cast<size_t>(cpu::kLogitBlock);
    const size_t end = std::min(logits.size(), first + static_cast<size_t>(cpu::kLogitBlock));
    for (size_t i = first; i < end; ++i) {
        left -= static_cast<double>(weights_[i]);
        if (left < 0) return static_cast<int32_t>(i);
    }
    size_t i = end - 1;
    while (weights_[i] == 0) --i;
    return static_cast<int32_t>(i);
}

int32_t Sampler::draw_kept(std::span<const float> logits, float max, double u) {
    candidates_.clear();
    const bool top_k = options_.top_k > 0 && options_.top_k < static_cast<int64_t>(logits.size());
    double total = 0;  // of what top_p restricts
    if (top_k) {
        keep_top_k(logits, max);
        weights_.resize(candidates_.size());
        scratch_.resize(candidates_.size());
        for (size_t i = 0; i < candidates_.size(); ++i) scratch_[i] = candidates_[i].logit;
        cpu::exp_weights(scratch_.data(), static_cast<int64_t>(scratch_.size()), max,
                         inverse(options_.temperature), weights_.data());
        for (size_t i = 0; i < candidates_.size(); ++i) {
            candidates_[i].weight = weights_[i];
            total += static_cast<double>(weights_[i]);
        }
    } else {
        total = keep_heavy(logits, max);
    }
    const auto weight = [](const Candidate& c) { return static_cast<double>(c.weight); };
    if (options_.top_p < 1) keep_prefix(total * static_cast<double>(options_.top_p), max, weight);
    std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < options_.min_p; });

    double sum = 0;
    for (const Candidate& c : candidates_) sum += weight(c);
    double left = u * sum;
    int32_t last = candidates_.front().id;
    for (const Candidate& c : candidates_) {
        left -= weight(c);
        if (left < 0) return c.id;
        if (c.weight > 0) last = c.id;
    }
    return last;
}

// Candidates: the k largest logits. At least k logits are not below the k-th largest maximum of a block.
void Sampler::keep_top_k(std::span<const float> logits, float max) {
    const auto k = static_cast<size_t>(options_.top_k);
    float bound = -kInf;
    if (k <= maxima_.size()) {
        scratch_ = maxima_;
        const auto kth = scratch_.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(scratch_.begin(), kth, scratch_.end(), std::greater<>());
        bound = *kth;
    }
    for_each_in_blocks(logits, maxima_, bound, [&](int32_t id) {
        const float x = logits[static_cast<size_t>(id)];
        if (x >= bound) candidates_.push_back({x, 0, id});
    });
    if (candidates_.size() > k)
        keep_prefix(static_cast<double>(k), max, [](const Candidate&) { return 1.0; });
}

// Candidates: every logit whose weight (1 for the largest) reaches a cutoff, lowered until they hold top_p of
// the total or the cutoff is min_p. Returns the total of all weights.
double Sampler::keep_heavy(std::span<const float> logits, float max) {
    const int64_t n = static_cast<int64_t>(logits.size());
    const float inv_temperature = inverse(options_.temperature);
    weights_.resize(logits.size());
    sums_.resize(maxima_.size());
    scratch_.resize(maxima_.size());
    cpu::exp_weights(logits.data(), n, max, inv_temperature, weights_.data());
    cpu::exp_weights(maxima_.data(), static_cast<int64_t>(maxima_.size()), max, inv_temperature,
                     scratch_.data());
    cpu::block_sums(weights_.data(), n, sums_.data());
    double total = 0;
    for (const double s : sums_) total += s;

    const double target = total * static_cast<double>(options_.top_p);
    for (float cutoff : {0x1p-4f, 0x1p-10f, 0.0f}) {
        if (options_.top_p == 1) cutoff = 0;  // min_p alone
        cutoff = std::max(cutoff, options_.min_p);
        candidates_.clear();
        double mass = 0;
        for_each_in_blocks(logits, scratch_, cutoff, [&](int32_t id) {
            const float w = weights_[static_cast<size_t>(id)];
            if (w < cutoff) return;
            candidates_.push_back({logits[static_cast<size_t>(id)], w, id});
            mass += static_cast<double>(w);
        });
        if (mass >= target || cutoff == options_.min_p) break;
    }
    return total;
}

// Keeps the smallest set of largest logits whose measures reach `target`, in the order of ids. A histogram
// over the logits finds the bucket in which the boundary lies, a selection inside that bucket finds the
// boundary: linear time, nothing is sorted but the last few.
template <class Measure>
void Sampler::keep_prefix(double target, float max, Measure measure) {
    constexpr int kBuckets = 1024;
    float range = 0;
    for (const Candidate& c : candidates_) range = std::max(range, c.logit > -kInf ? max - c.logit : 0.0f);
    range = std::min(range, 88.0f * options_.temperature);  // below that the weight is 0
    const float scale = static_cast<float>(kBuckets - 1) / std::max(range, 1e-30f);
    const auto bucket_of = [&](const Candidate& c) {
        const float q = (max - c.logit) * scale;
        return q < static_cast<float>(kBuckets - 1) ? static_cast<int>(q) : kBuckets - 1;
    };
    sums_.assign(kBuckets, 0.0);
    for (const Candidate& c : candidates_) sums_[static_cast<size_t>(bucket_of(c))] += measure(c);
    int edge = 0;
    for (; edge + 1 < kBuckets && sums_[static_cast<size_t>(edge)] < target; ++edge) {
        target -= sums_[static_cast<size_t>(edge)];
    }
    edge_.clear();
    for (const Candidate& c : candidates_) {
        if (bucket_of(c) == edge) edge_.push_back(c);
    }
    if (edge_.empty()) return;  // the target is beyond the sum by a rounding error
    const Candidate last = boundary(edge_, target, measure);
    std::erase_if(candidates_, [&](const Candidate& c) {
        const int bucket = bucket_of(c);
        return bucket > edge || (bucket == edge && before(last, c));
    });
}

int32_t argmax(std::span<const float> logits) {
    require(!logits.empty(), "argmax", "there are no logits");
    const cpu::Largest best = cpu::largest(logits.data(), static_cast<int64_t>(logits.size()));
    if (best.has_nan) fail_nan("argmax", logits);
    return static_cast<int32_t>(best.index);
}

void argmax(const Exec& ex, View<const float, 2> logits, View<int32_t, 1> ids) {
    constexpr std::string_view op = "argmax";
    require_device(op, ex);
    const int64_t b = logits.shape[0], v = logits.shape[1];
    if (b == 0) return;
    require(static_cast<bool>(logits) && v > 0, op, "there are no logits");
    require_shape(op, "ids", "b", ids, {b});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::argmax(ex, logits, ids);
    }
    for (int64_t i = 0; i < b; ++i) ids(i) = argmax({logits.row(i), static_cast<size_t>(v)});
}

}  // namespace ssm
