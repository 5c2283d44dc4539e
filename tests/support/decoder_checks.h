// What a Decoder must fulfil on either device.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "ssm/generate/decoder.h"
#include "tests/support/model_case.h"

namespace ssm::test {

inline std::vector<float> host_row(const Tensor& logits, int64_t row) {
    const Tensor host = logits.rows(row, row + 1).clone().to_host();
    return {host.data<float>(), host.data<float>() + host.size()};
}

// Logits of the last token of a sequence read at once.
inline std::vector<float> last_logits(const Exec& ex, LanguageModel& model, const std::vector<int32_t>& ids) {
    const auto t = static_cast<int64_t>(ids.size());
    const int64_t cu_seqlens[] = {0, t};
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens, .activation = model.dtype()};
    const Var hidden = model.hidden(ctx, {ids.data(), {t}}, nullptr);
    return host_row(model.logits(ctx, hidden.value().rows(t - 1, t)), 0);
}

// Sequences in slots: some read a prompt, all are stepped in changing groups and orders, a slot is cleared
// and used again; at every step each row of logits is that of its sequence read at once.
inline void expect_decodes(const Exec& ex, const ReferenceShape& shape, int64_t slots, DType dtype,
                           double tolerance) {
    SCOPED_TRACE(fmt::format("{} slots, {}", slots, name_of(dtype)));
    const ModelCase c(shape, 1, dtype);
    c.model->move_to(ex);
    Decoder decoder(ex, *c.model, slots);
    std::vector<std::vector<int32_t>> sequences(static_cast<size_t>(slots));
    Random random(11);
    const auto draw = [&] { return static_cast<int32_t>(random.integer(0, shape.vocab - 1)); };
    const auto expect_row = [&](int64_t row, int32_t slot) {
        const auto& ids = sequences[static_cast<size_t>(slot)];
        expect_close(host_row(decoder.logits(), row), last_logits(ex, *c.model, ids), tolerance, "logits");
    };
    const auto read = [&](int32_t slot, int64_t count) {
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < count; ++i) ids.push_back(draw());
        decoder.read(slot, ids);
        for (const int32_t id : ids) sequences[static_cast<size_t>(slot)].push_back(id);
        if (count > 0) expect_row(0, slot);
    };
    const auto step = [&](const std::vector<int32_t>& group) {
        std::vector<int32_t> ids;
        for (const int32_t slot : group) {
            ids.push_back(draw());
            sequences[static_cast<size_t>(slot)].push_back(ids.back());
        }
        decoder.step(group, ids);
        for (size_t i = 0; i < group.size(); ++i) expect_row(static_cast<int64_t>(i), group[i]);
    };
    for (int32_t slot = 0; slot < slots; slot += 2) read(slot, 1 + slot % 7);
    std::vector<int32_t> all, some;
    for (int32_t slot = 0; slot < slots; ++slot) all.push_back(static_cast<int32_t>(slots) - 1 - slot);
    for (int32_t slot = 0; slot < slots; slot += 3) some.push_back(slot);
    for (int i = 0; i < 2; ++i) {
        step(all);
        step(all);
        step(some);
        const auto again = static_cast<int32_t>(slots / 2);
        decoder.clear(again);
        sequences[static_cast<size_t>(again)].clear();
        read(again, 3 * i);
        step({again});
    }
}

// Greedy steps fed on the device are those fed from the host.
inline void expect_greedy_steps(const Exec& ex, const ReferenceShape& shape, int64_t slots) {
    const ModelCase c(shape);
    c.model->move_to(ex);
    Decoder one(ex, *c.model, slots), two(ex, *c.model, slots);
    std::vector<int32_t> all, ids;
    for (int32_t slot = 0; slot < slots; ++slot) {
        all.push_back(slot);
        ids.push_back(static_cast<int32_t>((slot * 7 + 1) % shape.vocab));
    }
    one.step(all, ids);
    two.step(all, ids);
    for (int i = 0; i < 12; ++i) {
        ids = two.next_ids();
        EXPECT_EQ(one.next_ids(), ids);
        for (int64_t row = 0; row < slots; ++row) {
            const auto logits = host_row(two.logits(), row);
            EXPECT_EQ(ids[static_cast<size_t>(row)],
                      std::max_element(logits.begin(), logits.end()) - logits.begin());
        }
        one.step();
        two.step(all, ids);
    }
}

// A state copied to another slot of another decoder goes on like the first.
inline void expect_states_move(const Exec& ex, const ReferenceShape& shape, DType states = DType::f32) {
    const ModelCase c(shape);
    c.model->move_to(ex);
    Decoder one(ex, *c.model, 3, states), two(ex, *c.model, 2, states);
    const std::vector<int32_t> prompt{1, 2, 3, 4, 5}, slot{2}, other{0}, id{6};
    one.read(2, prompt);
    ModelState state = c.model->new_state(1);
    one.save(2, state);
    two.load(0, state);
    one.step(slot, id);
    two.step(other, id);
    EXPECT_EQ(host_row(one.logits(), 0), host_row(two.logits(), 0));
}

}  // namespace ssm::test
