// SlotSamplers against one Sampler a slot.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "ssm/ops/sample/slot_samplers.h"
#include "tests/support/compare.h"
#include "tests/support/expect_error.h"

namespace ssm::test {

inline std::vector<SamplerOptions> sampler_cases() {
    return {
        {.temperature = 0},
        {.temperature = 0, .repetition_penalty = 1.7f},
        {.seed = 3},
        {.temperature = 0.7f, .seed = 4},
        {.temperature = 3.0f, .top_k = 40, .seed = 5},
        {.temperature = 0.8f, .top_p = 0.95f, .seed = 6},
        {.temperature = 2.0f, .top_p = 0.5f, .seed = 7},
        {.min_p = 0.1f, .seed = 8},
        {.temperature = 1.5f,
         .top_k = 100,
         .top_p = 0.9f,
         .min_p = 0.02f,
         .repetition_penalty = 1.3f,
         .seed = 9},
        {.temperature = 1e-3f, .top_p = 0.9f, .seed = 10},
        {.temperature = 50.0f, .top_k = 3000, .top_p = 0.99f, .seed = 11},
    };
}

// `steps` choices from other logits each, the chosen fed to the next, in a rotation of the slots. A choice
// may differ where rounding decides: at most one in 200 (then the slot follows the CPU's).
inline void expect_like_samplers(const Exec& ex, int64_t v, int steps) {
    SCOPED_TRACE(v);
    const auto cases = sampler_cases();
    const auto slots = static_cast<int64_t>(cases.size());
    SlotSamplers there(ex, slots, v);
    std::vector<Sampler> here;
    std::vector<std::vector<int32_t>> histories;
    Random random(static_cast<uint64_t>(v) + 5);
    for (int64_t slot = 0; slot < slots; ++slot) {
        here.emplace_back(cases[static_cast<size_t>(slot)]);
        here.back().set_draws(static_cast<uint64_t>(slot));
        histories.push_back({static_cast<int32_t>(random.integer(0, v - 1)), static_cast<int32_t>(v / 2)});
        there.set(ex, slot, cases[static_cast<size_t>(slot)], static_cast<uint64_t>(slot), histories.back());
    }
    const int64_t columns = v + 3;  // padding, never chosen
    int differing = 0;
    for (int step = 0; step < steps; ++step) {
        std::vector<int32_t> order(static_cast<size_t>(slots)), want, got;
        std::iota(order.begin(), order.end(), 0);
        std::rotate(order.begin(), order.begin() + step % slots, order.end());
        auto logits = random.vector(slots * columns, -6.0f, 6.0f);
        for (int64_t i = 0; i < slots; ++i)
            for (int64_t j = v; j < columns; ++j) logits[static_cast<size_t>(i * columns + j)] = 100.0f;
        const Tensor ids = Tensor::empty({slots}, DType::i32), order_ids = Tensor::empty({slots}, DType::i32);
        for (int64_t i = 0; i < slots; ++i) {
            const auto slot = static_cast<size_t>(order[static_cast<size_t>(i)]);
            want.push_back(here[slot].sample({logits.data() + i * columns, static_cast<size_t>(columns)}, v,
                                             histories[slot]));
            ids.data<int32_t>()[i] = histories[slot].back();
            order_ids.data<int32_t>()[i] = order[static_cast<size_t>(i)];
        }
        const Tensor rows = Tensor::from_floats({slots, columns}, logits).to(ex), chosen = ids.to(ex),
                     places = order_ids.to(ex);
        there.sample(ex, rows.view<const float, 2>(), places.view<const int32_t, 1>(),
                     chosen.view<int32_t, 1>(), step > 0);
        const Tensor host = chosen.to_host();
        for (int64_t i = 0; i < slots; ++i) {
            const auto at = static_cast<size_t>(i);
            differing += host.data<int32_t>()[i] != want[at];
            histories[static_cast<size_t>(order[at])].push_back(want[at]);
        }
    }
    EXPECT_LE(differing, steps * slots / 200);
    for (int64_t slot = 0; slot < slots; ++slot)
        EXPECT_EQ(there.draws(slot), here[static_cast<size_t>(slot)].draws());
}

}  // namespace ssm::test
