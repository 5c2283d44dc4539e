#include "ssm/tasks/selective_copying/selective_copying.h"

#include <algorithm>

namespace ssm::selective_copying {
namespace {

int32_t symbol(uint64_t key, int64_t i) {
    return 1 + static_cast<int32_t>(draw(key, static_cast<uint64_t>(i), kSymbols));
}

void write(uint64_t key, const TaskPiece& p) {
    const auto positions = data_positions(key, p.length);
    const int64_t end = p.begin + static_cast<int64_t>(p.ids.size()), markers = p.length - kCopies;
    std::ranges::fill(p.ids, kNoise);
    std::ranges::fill(p.targets, -1);
    for (int64_t i = 0; i < kCopies; ++i) {
        const int64_t at = positions[i], asked = markers + i;
        if (at >= p.begin && at < end) p.ids[at - p.begin] = symbol(key, i);
        if (asked < p.begin || asked >= end) continue;
        p.ids[asked - p.begin] = kMarker;
        p.targets[asked - p.begin] = symbol(key, i);
    }
}

}  // namespace

// Floyd's choice of k of n (Bentley & Floyd 1987): for j = n-k .. n-1 a draw t of [0, j], or j when t is in.
std::array<int64_t, kCopies> data_positions(uint64_t key, int64_t length) {
    std::array<int64_t, kCopies> chosen{};
    const uint64_t places_key = mix64(~key);
    const int64_t places = length - kCopies;
    for (int64_t i = 0; i < kCopies; ++i) {
        const int64_t j = places - kCopies + i;
        auto t =
            static_cast<int64_t>(draw(places_key, static_cast<uint64_t>(i), static_cast<uint64_t>(j + 1)));
        if (std::find(chosen.begin(), chosen.begin() + i, t) != chosen.begin() + i) t = j;
        chosen[i] = t;
    }
    std::ranges::sort(chosen);
    return chosen;
}

Task task() {
    return {.name = "selective-copying",
            .summary = "16 tokens scattered in noise, to be given back in order at the end.",
            .vocab = kVocab,
            .shortest = 2 * kCopies,
            .chance = 1.0 / kSymbols,
            .write = write,
            .recipe = {.layers = 2,
                       .e = 64,
                       .length = 4096,
                       .batch = 64,
                       .steps = 24'000,
                       .first_length = 256,
                       .double_every = 3000,
                       .learning_rate = 2e-3,
                       .last_learning_rate = 1e-5,
                       .eval_lengths = {4096}}};
}

}  // namespace ssm::selective_copying
