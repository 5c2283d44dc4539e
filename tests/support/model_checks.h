// What every architecture must fulfil, whatever its shape: one function a property, called by the tests of
// ssm/models/<architecture>. The reference is tests/support/reference_model.h.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <ostream>
#include <string>
#include <vector>

#include "tests/support/model_case.h"

namespace ssm::test {

struct NamedShape {
    std::string name;
    ReferenceShape shape;
};
inline std::ostream& operator<<(std::ostream& out, const NamedShape& s) { return out << s.name; }
inline std::string shape_name(const testing::TestParamInfo<NamedShape>& info) { return info.param.name; }

// Logits and loss of packed sequences, odd, empty and of one token among them.
inline void expect_matches_reference(const ReferenceShape& shape) {
    const ModelCase c(shape);
    const Exec ex = make_cpu_exec(1);
    for (const std::vector<int64_t>& lengths :
         std::vector<std::vector<int64_t>>{{1}, {2}, {7, 0, 1, 65, 2}, {130}}) {
        SCOPED_TRACE(testing::PrintToString(lengths));
        const PackedTokens tokens(lengths, shape.vocab);
        expect_close(run_logits(ex, *c.model, tokens.ids, tokens.cu_seqlens),
                     c.reference.logits(tokens.ids, tokens.cu_seqlens), 1e-5, "logits");
        if (tokens.size() < 2) continue;
        Ctx ctx{.exec = ex, .cu_seqlens = tokens.cu_seqlens};
        const View<const int32_t, 1> ids{tokens.ids.data(), {tokens.size()}},
            targets{tokens.targets.data(), {tokens.size()}};
        const double loss = c.reference.loss(tokens.ids, tokens.targets, tokens.cu_seqlens);
        EXPECT_NEAR(c.model->loss(ctx, ids, targets).value().item(), loss, 1e-5 * loss);
        const Var hidden = c.model->hidden(ctx, ids, nullptr);
        std::vector<float> nll = nan_vector(tokens.size());
        c.model->nll(ctx, hidden.value(), targets, {nll.data(), {tokens.size()}});
        expect_close(nll, c.reference.nll(tokens.ids, tokens.targets, tokens.cu_seqlens), 1e-5, "nll");
    }
}

// The gradient of every parameter, a few entries of each, against differences of the reference.
inline void expect_gradients(const ReferenceShape& shape, const std::vector<int64_t>& lengths) {
    ModelCase c(shape);
    const Exec ex = make_cpu_exec(1);
    const PackedTokens tokens(lengths, shape.vocab);
    const View<const int32_t, 1> ids{tokens.ids.data(), {tokens.size()}},
        targets{tokens.targets.data(), {tokens.size()}};
    c.model->require_grad();
    const double loss = c.reference.loss(tokens.ids, tokens.targets, tokens.cu_seqlens);
    std::map<std::string, std::vector<float>> once, twice;
    for (auto* gradients : {&once, &twice}) {  // a second pass adds to the first
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = tokens.cu_seqlens};
        EXPECT_NEAR(c.model->loss(ctx, ids, targets).value().item(), loss, 1e-5 * loss);
        tape.backward();
        c.model->visit([&](const std::string& name, Parameter& p) {
            const Tensor grad = p.var.grad(ex);
            (*gradients)[name].assign(grad.data<const float>(), grad.data<const float>() + grad.size());
        });
    }
    for (auto& [name, gradient] : once) {
        std::vector<double> doubled;
        for (const float g : gradient) doubled.push_back(2 * static_cast<double>(g));
        expect_close(twice.at(name), doubled, 1e-5, name.c_str());
    }

    Random random(3);
    c.model->visit([&](const std::string& name, Parameter&) {
        std::vector<double>& value = c.reference.parameters.at(name);
        // The error counts relative to the sampled entries or, where these happen to be small ones, to as
        // many of the gradient's usual size.
        double usual = 0, difference = 0, norm = 0;
        constexpr int kSamples = 5;
        for (const float g : once.at(name)) usual += static_cast<double>(g) * static_cast<double>(g);
        usual *= static_cast<double>(kSamples) / static_cast<double>(value.size());
        for (int sample = 0; sample < kSamples; ++sample) {
            const auto i = static_cast<size_t>(random.integer(0, static_cast<int64_t>(value.size()) - 1));
            const double keep = value[i], step = 1e-4;  // rounding: eps loss / step, 1e-12
            value[i] = keep + step;
            const double up = c.reference.loss(tokens.ids, tokens.targets, tokens.cu_seqlens);
            value[i] = keep - step;
            const double down = c.reference.loss(tokens.ids, tokens.targets, tokens.cu_seqlens);
            value[i] = keep;
            const double expected = (up - down) / (2 * step);
            difference += std::pow(static_cast<double>(once.at(name)[i]) - expected, 2);
            norm += expected * expected;
        }
        EXPECT_LE(std::sqrt(difference), 1e-4 * std::sqrt(std::max(norm, usual))) << name;
    });
}

// Logits and gradients do not depend on the number of threads, not in one bit.
inline void expect_threads_do_not_matter(const ReferenceShape& shape) {
    const PackedTokens tokens({70, 1, 33}, shape.vocab);
    const View<const int32_t, 1> ids{tokens.ids.data(), {tokens.size()}},
        targets{tokens.targets.data(), {tokens.size()}};
    std::vector<std::vector<float>> runs;
    for (const int threads : {1, 2, 3}) {
        ModelCase c(shape);
        const Exec ex = make_cpu_exec(threads);
        runs.push_back(run_logits(ex, *c.model, tokens.ids, tokens.cu_seqlens));
        c.model->require_grad();
        Tape tape;
        Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = tokens.cu_seqlens};
        runs.back().push_back(c.model->loss(ctx, ids, targets).value().item());
        tape.backward();
        c.model->visit([&](const std::string&, Parameter& p) {
            const Tensor grad = p.var.grad(ex);
            runs.back().insert(runs.back().end(), grad.data<const float>(),
                               grad.data<const float>() + grad.size());
        });
    }
    EXPECT_EQ(runs[0], runs[1]);
    EXPECT_EQ(runs[0], runs[2]);
}

// One sequence read whole, in pieces and step by step: the same logits, and the reference's final state.
inline void expect_pieces_equal_whole(const ReferenceShape& shape) {
    const ModelCase c(shape);
    const Exec ex = make_cpu_exec(1);
    const PackedTokens tokens({131}, shape.vocab);
    std::vector<ReferenceState> end;
    const std::vector<double> expected = c.reference.logits(tokens.ids, &end);
    const auto expect_end = [&](ModelState& state, const std::vector<float>& logits) {
        expect_close(logits, expected, 1e-5, "logits");
        expect_close(state_values(state), state_values(end), 1e-5, "final state");
    };
    for (const int64_t piece : {int64_t{1}, int64_t{3}, int64_t{64}, tokens.size()}) {
        SCOPED_TRACE(piece);
        ModelState state = c.model->new_state(1);
        std::vector<float> logits;
        for (int64_t begin = 0; begin < tokens.size(); begin += piece) {
            const int64_t t = std::min(piece, tokens.size() - begin), cu_seqlens[] = {0, t};
            const std::span<const int32_t> ids(tokens.ids.data() + begin, static_cast<size_t>(t));
            const auto part = run_logits(ex, *c.model, ids, cu_seqlens, &state);
            logits.insert(logits.end(), part.begin(), part.end());
        }
        expect_end(state, logits);
    }
    SCOPED_TRACE("steps");
    ModelState state = c.model->new_state(1);
    std::vector<float> logits;
    for (const int32_t& id : tokens.ids) {
        const auto part = run_logits(ex, *c.model, {&id, 1}, {}, &state);
        logits.insert(logits.end(), part.begin(), part.end());
    }
    expect_end(state, logits);
}

// Three sequences at once, packed with states and then stepped together, equal each alone.
inline void expect_batch_equals_one(const ReferenceShape& shape) {
    const ModelCase c(shape);
    const Exec ex = make_cpu_exec(1);
    constexpr int64_t kSequences = 3, kSteps = 4;
    const std::vector<int64_t> lengths{5, 1, 9};
    const PackedTokens prompt(lengths, shape.vocab), steps({kSteps * kSequences}, shape.vocab, 8);
    ModelState state = c.model->new_state(kSequences);
    std::vector<std::vector<float>> logits(kSequences);
    const auto append = [&](int64_t s, const std::vector<float>& rows, int64_t begin, int64_t end) {
        logits[s].insert(logits[s].end(), rows.begin() + begin * shape.vocab,
                         rows.begin() + end * shape.vocab);
    };
    const auto packed = run_logits(ex, *c.model, prompt.ids, prompt.cu_seqlens, &state);
    for (int64_t s = 0; s < kSequences; ++s)
        append(s, packed, prompt.cu_seqlens[s], prompt.cu_seqlens[s + 1]);
    for (int64_t i = 0; i < kSteps; ++i) {
        const std::span<const int32_t> ids(steps.ids.data() + i * kSequences, kSequences);
        const auto rows = run_logits(ex, *c.model, ids, {}, &state);
        for (int64_t s = 0; s < kSequences; ++s) append(s, rows, s, s + 1);
    }
    for (int64_t s = 0; s < kSequences; ++s) {
        SCOPED_TRACE(s);
        std::vector<int32_t> alone(prompt.ids.begin() + prompt.cu_seqlens[s],
                                   prompt.ids.begin() + prompt.cu_seqlens[s + 1]);
        for (int64_t i = 0; i < kSteps; ++i) alone.push_back(steps.ids[i * kSequences + s]);
        const int64_t cu_seqlens[] = {0, static_cast<int64_t>(alone.size())};
        ModelState one = c.model->new_state(1);
        expect_close(logits[s], run_logits(ex, *c.model, alone, cu_seqlens, &one), 1e-5, "alone");
        expect_close(logits[s], c.reference.logits(alone), 1e-5, "reference");
    }
}

// bf16 weights and activations against the reference with the same rounded weights.
inline void expect_bf16(const ReferenceShape& shape) {
    const ModelCase c(shape, 1, DType::bf16);
    ASSERT_EQ(c.model->dtype(), DType::bf16);
    const Exec ex = make_cpu_exec(1);
    const PackedTokens tokens({33, 1, 6}, shape.vocab);
    const auto expected = c.reference.logits(tokens.ids, tokens.cu_seqlens);
    expect_close(run_logits(ex, *c.model, tokens.ids, tokens.cu_seqlens), expected, 2e-2, "packed");
    std::vector<float> logits;
    ModelState state = c.model->new_state(1);
    for (int64_t i = 0; i < tokens.size(); ++i) {
        if (std::ranges::count(tokens.cu_seqlens, i) > 0) state = c.model->new_state(1);
        const auto row = run_logits(ex, *c.model, {&tokens.ids[i], 1}, {}, &state);
        logits.insert(logits.end(), row.begin(), row.end());
    }
    expect_close(logits, expected, 2e-2, "steps");
}

}  // namespace ssm::test
