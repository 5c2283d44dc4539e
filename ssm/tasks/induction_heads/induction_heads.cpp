#include "ssm/tasks/induction_heads/induction_heads.h"

#include <algorithm>

namespace ssm::induction_heads {
namespace {

// Tokens are draws 0 .. length-1 of the key; the place of the prefix is a draw of another one.
int32_t token(uint64_t key, int64_t position) {
    return static_cast<int32_t>(draw(key, static_cast<uint64_t>(position), kOrdinary));
}

void write(uint64_t key, const TaskPiece& p) {
    const int64_t first = prefix_position(key, p.length), last = p.length - 1;
    const auto count = static_cast<int64_t>(p.ids.size());
    for (int64_t i = 0; i < count; ++i) p.ids[i] = token(key, p.begin + i);
    std::ranges::fill(p.targets, -1);
    const auto inside = [&](int64_t position) { return position >= p.begin && position < p.begin + count; };
    if (inside(first)) p.ids[first - p.begin] = kPrefix;
    if (inside(last)) {
        p.ids[last - p.begin] = kPrefix;
        p.targets[last - p.begin] = token(key, first + 1);
    }
}

}  // namespace

int64_t prefix_position(uint64_t key, int64_t length) {
    return static_cast<int64_t>(draw(mix64(~key), 0, static_cast<uint64_t>(length - 2)));
}

Task task() {
    Task t{.name = "induction-heads",
           .summary = "What followed the prefix token the first time? Asked at the end.",
           .vocab = kVocab,
           .shortest = 3,
           .chance = 1.0 / kOrdinary,
           .write = write,
           .recipe = {.layers = 2,
                      .e = 64,
                      .length = 256,
                      .batch = 8,
                      .steps = 204'800,
                      .learning_rate = 2e-3,
                      .eps = 1e-16,
                      .dt_min = 1e-9,
                      .dt_max = 1e-8,
                      .eval_lengths = {}}};
    for (int64_t power = 6; power <= 20; ++power) t.recipe.eval_lengths.push_back(int64_t{1} << power);
    return t;
}

}  // namespace ssm::induction_heads
