#include "ssm/generate/decoder.h"

#include <algorithm>

#include "ssm/ops/elementwise/elementwise.h"
#include "ssm/ops/sample/sample.h"

namespace ssm {
namespace {

constexpr std::string_view kWhere = "decode";

// Rows of a state, in whichever type each of them has.
void copy(const Exec& ex, const Tensor& from, const Tensor& to) {
    if (from.dtype() == to.dtype()) return to.copy_from(from);
    const auto as_row = [](const Tensor& t) { return t.reshape({1, t.size()}); };
    if (to.dtype() == DType::bf16) {
        cast(ex, as_row(from).view<const float, 2>(), as_row(to).view<bf16, 2>());
    } else {
        cast(ex, as_row(from).view<const bf16, 2>(), as_row(to).view<float, 2>());
    }
}

// Sizes of a step: powers of two and three quarters of them from 12 on, up to `most`.
int64_t padded(int64_t b, int64_t most) {
    int64_t size = 1;
    while (size < b) size *= 2;
    if (size >= 16 && b <= size / 4 * 3) size = size / 4 * 3;
    return std::min(size, most);
}

template <class F>
void for_each_pair(ModelState& a, ModelState& b, F&& f) {
    std::vector<Tensor*> all;
    b.visit([&](const std::string&, Tensor& t) { all.push_back(&t); });
    size_t i = 0;
    a.visit([&](const std::string&, Tensor& t) { f(t, *all[i++]); });
}

}  // namespace

Decoder::Decoder(const Exec& ex, LanguageModel& model, int64_t slots, DType states)
    : exec_(ex),
      own_(with_own_memory(ex)),
      model_(model),
      slots_(slots),
      valid_(model.vocab()),
      states_(states) {
    require(slots >= 1, kWhere, "a decoder needs at least one slot");
    const bool gpu = ex.device != Device::cpu;
    require(states == DType::f32 || states == DType::bf16, kWhere, "states are f32 or bf16, not {}",
            name_of(states));
    if (states == DType::bf16 && !gpu) fail(ErrorCode::unsupported, kWhere, "bf16 states need a GPU");
    pool_ = model.new_state(slots + (gpu ? 1 : 0), states);
    ids_ = Tensor::zeros(ex, {slots}, DType::i32);
    slot_ids_ = Tensor::zeros(ex, {slots}, DType::i32);
}

void Decoder::clear(int64_t slot) {
    require(slot >= 0 && slot < slots_, kWhere, "there is no slot {}: there are {}", slot, slots_);
    pool_.visit([&](const std::string&, Tensor& t) { t.rows(slot, slot + 1).fill_zero(); });
}

void Decoder::save(int64_t slot, ModelState& one) const {
    for_each_pair(pool_, one, [&](Tensor& from, Tensor& to) { copy(exec_, from.rows(slot, slot + 1), to); });
}

void Decoder::load(int64_t slot, ModelState& one, const Tensor& logits) {
    for_each_pair(pool_, one, [&](Tensor& to, Tensor& from) { copy(exec_, from, to.rows(slot, slot + 1)); });
    if (!logits) return;
    const auto at = static_cast<int32_t>(slot);
    set_slots({&at, 1});
    logits_ = Tensor::empty(exec_, {1, model_.vocab()});
    logits_.copy_from(logits);
}

size_t Decoder::state_bytes_per_slot() const {
    size_t bytes = 0;
    pool_.visit([&](const std::string&, Tensor& t) { bytes += t.rows(0, 1).bytes(); });
    return bytes;
}

void Decoder::require_ids(std::span<const int32_t> ids) const {
    for (const int32_t id : ids) {
        require(0 <= id && id < model_.vocab(), "model", "token id {} is outside the vocabulary of {}", id,
                model_.vocab());
    }
}

void Decoder::set_slots(std::span<const int32_t> slots) {
    if (std::ranges::equal(slots, active_)) return;
    const auto count = static_cast<int64_t>(slots.size());
    require(count >= 1 && count <= slots_, kWhere, "a step has 1 to {} slots, not {}", slots_, count);
    std::vector<bool> seen(static_cast<size_t>(slots_));
    for (const int32_t slot : slots) {
        require(slot >= 0 && slot < slots_, kWhere, "there is no slot {}: there are {}", slot, slots_);
        require(!seen[static_cast<size_t>(slot)], kWhere, "slot {} is twice in a step", slot);
        seen[static_cast<size_t>(slot)] = true;
    }
    active_.assign(slots.begin(), slots.end());
    std::vector<int32_t> all(active_);
    if (exec_.device != Device::cpu) all.resize(static_cast<size_t>(slots_), static_cast<int32_t>(slots_));
    const auto n = static_cast<int64_t>(all.size());
    slot_ids_.rows(0, n).copy_from(Tensor::wrap(all.data(), {n}, DType::i32, nullptr));
}

void Decoder::read(int64_t slot, std::span<const int32_t> ids) {
    require_ids(ids);
    const auto count = static_cast<int64_t>(ids.size());
    if (count == 0) return;
    const auto at = static_cast<int32_t>(slot);
    if (count == 1) return step({&at, 1}, ids);
    set_slots({&at, 1});
    ModelState one = model_.new_state(1);
    save(slot, one);
    for (int64_t begin = 0; begin < count;) {
        const int64_t t = std::min(kPrefillChunk, count - begin);
        const int64_t cu_seqlens[] = {0, t};
        Ctx ctx{.exec = exec_, .activation = model_.dtype()};
        if (t > 1) ctx.cu_seqlens = cu_seqlens;
        const Var hidden = model_.hidden(ctx, {ids.data() + begin, {t}}, &one);
        begin += t;
        if (begin == count) logits_ = model_.logits(ctx, hidden.value().rows(t - 1, t));
    }
    load(slot, one);
    if (samplers_) samplers_->saw(exec_, slot, ids);
    choose(logits_, false);
}

void Decoder::step(std::span<const int32_t> slots, std::span<const int32_t> ids) {
    require_ids(ids);
    require(slots.size() == ids.size(), kWhere, "{} slots but {} ids", slots.size(), ids.size());
    set_slots(slots);
    const auto count = static_cast<int64_t>(ids.size());
    const Tensor host = Tensor::empty({count}, DType::i32);
    std::copy(ids.begin(), ids.end(), host.data<int32_t>());
    ids_.rows(0, count).copy_from(host);
    run(count);
}

void Decoder::step() {
    require(!active_.empty(), kWhere, "nothing was read yet");
    run(static_cast<int64_t>(active_.size()));
}

void Decoder::set_valid(int64_t valid) {
    require(valid >= 1 && valid <= model_.vocab(), kWhere, "valid = {} is outside [1, {}], the vocabulary",
            valid, model_.vocab());
    if (valid == valid_) return;
    require(!samplers_, kWhere, "the number of valid ids cannot change once a sampler is set");
    valid_ = valid;
    shapes_.clear();
}

void Decoder::set_sampler(int64_t slot, const SamplerOptions& options, uint64_t draws,
                          std::span<const int32_t> history) {
    if (!samplers_) {
        // On a GPU nobody's slot has one, too.
        samplers_.emplace(exec_, slots_ + (exec_.device != Device::cpu ? 1 : 0), valid_);
        shapes_.clear();
    }
    samplers_->set(exec_, slot, options, draws, history);
}

void Decoder::choose_again() {
    require(static_cast<bool>(logits_), kWhere, "nothing was read yet");
    choose(logits_, false);
}

// `fed`: ids_ holds what the slots have just read.
void Decoder::choose(const Tensor& logits, bool fed) const {
    const int64_t b = logits.dim(0);
    const auto ids = ids_.rows(0, b).view<int32_t, 1>();
    const auto valid = logits.columns(0, valid_).view<const float, 2>();
    if (!samplers_) return argmax(exec_, valid, ids);
    samplers_->sample(exec_, valid, slot_ids_.rows(0, b).view<const int32_t, 1>(), ids, fed);
}

void Decoder::compute(int64_t b, const Tensor& logits) {
    Ctx ctx{
        .exec = own_, .activation = model_.dtype(), .slots = slot_ids_.rows(0, b).view<const int32_t, 1>()};
    model_.step(ctx, ids_.rows(0, b), pool_, logits);
    choose(logits, true);
}

void Decoder::run(int64_t count) {
    if (exec_.device == Device::cpu) {
        logits_ = Tensor::empty(own_, {count, model_.vocab()});
        return compute(count, logits_);
    }
    const int64_t b = padded(count, slots_);
    Shape& shape = shapes_[b];
    if (!shape.logits) shape.logits = Tensor::empty(exec_, {b, model_.vocab()});
    logits_ = shape.logits.rows(0, count);
    if (shape.graph) return shape.graph.launch(exec_);
    // The first step of a size runs as it is, and is then captured: everything is made and loaded by now.
    compute(b, shape.logits);
    shape.graph = Graph::capture(own_, [&] { compute(b, shape.logits); });
}

std::vector<int32_t> Decoder::next_ids() const {
    const Tensor host = ids_.rows(0, static_cast<int64_t>(active_.size())).to_host();
    for (int64_t i = 0; i < host.size(); ++i) {
        if (host.data<int32_t>()[i] < 0)
            fail(ErrorCode::numeric, "sample", "the logits of slot {} are NaN, inf or all -inf",
                 active_[static_cast<size_t>(i)]);
    }
    return {host.data<int32_t>(), host.data<int32_t>() + host.size()};
}

}  // namespace ssm
