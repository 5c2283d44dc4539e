#include "ssm/ops/sample/slot_samplers.h"

#include <cstring>

#include "ssm/ops/sample/sample_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "sample";

}  // namespace

SlotSamplers::SlotSamplers(const Exec& ex, int64_t slots, int64_t valid) : slots_(slots), valid_(valid) {
    require_device(kOp, ex);
    require(slots >= 1 && valid >= 1, kOp, "{} slots of {} ids: there must be some", slots, valid);
    if (ex.device == Device::cpu) {
        host_ = std::make_shared<OnHost>();
        host_->samplers.assign(static_cast<size_t>(slots), Sampler({.temperature = 0}));
        host_->histories.resize(static_cast<size_t>(slots));
        return;
    }
    const Tensor state = Tensor::empty({slots, static_cast<int64_t>(sizeof(Slot))}, DType::u8);
    for (int64_t i = 0; i < slots; ++i) {
        const Slot greedy;
        std::memcpy(state.rows(i, i + 1).raw(), &greedy, sizeof(Slot));
    }
    state_ = state.to(ex);
    seen_ = Tensor::zeros(ex, {slots, (valid + 31) / 32}, DType::u32);
}

void SlotSamplers::set(const Exec& ex, int64_t slot, const SamplerOptions& o, uint64_t draws,
                       std::span<const int32_t> history) {
    require(slot >= 0 && slot < slots_, kOp, "there is no slot {}: there are {}", slot, slots_);
    Sampler sampler(o);  // checks the options
    sampler.set_draws(draws);
    if (host_) {
        host_->samplers[static_cast<size_t>(slot)] = sampler;
        host_->histories[static_cast<size_t>(slot)].clear();
    } else {
        const Slot s{.temperature = o.temperature,
                     .top_p = o.top_p,
                     .min_p = o.min_p,
                     .repetition_penalty = o.repetition_penalty,
                     .top_k = o.top_k,
                     .seed = o.seed,
                     .draws = draws};
        const Tensor bytes = Tensor::empty({1, static_cast<int64_t>(sizeof(Slot))}, DType::u8);
        std::memcpy(bytes.raw(), &s, sizeof(Slot));
        state_.rows(slot, slot + 1).copy_from(bytes);
        seen_.rows(slot, slot + 1).fill_zero();
    }
    saw(ex, slot, history);
}

void SlotSamplers::saw(const Exec& ex, int64_t slot, std::span<const int32_t> ids) {
    require(slot >= 0 && slot < slots_, kOp, "there is no slot {}: there are {}", slot, slots_);
    for (const int32_t id : ids)
        require(id >= 0 && id < valid_, kOp, "the history holds id {}, outside [0, {})", id, valid_);
    if (ids.empty()) return;
    if (host_) {
        auto& history = host_->histories[static_cast<size_t>(slot)];
        history.insert(history.end(), ids.begin(), ids.end());
        return;
    }
    if constexpr (kHasCuda) {
        const Tensor there =
            on_device_of(ex, View<const int32_t, 1>{ids.data(), {static_cast<int64_t>(ids.size())}});
        cuda::mark_seen(ex, there.view<const int32_t, 1>(), seen_.rows(slot, slot + 1).view<uint32_t, 1>());
    }
}

uint64_t SlotSamplers::draws(int64_t slot) const {
    require(slot >= 0 && slot < slots_, kOp, "there is no slot {}: there are {}", slot, slots_);
    if (host_) return host_->samplers[static_cast<size_t>(slot)].draws();
    Slot s;
    std::memcpy(&s, state_.rows(slot, slot + 1).to_host().raw(), sizeof(Slot));
    return s.draws;
}

void SlotSamplers::sample(const Exec& ex, View<const float, 2> logits, Slots slots, View<int32_t, 1> ids,
                          bool seen_before) const {
    const int64_t b = logits.shape[0];
    if (b == 0) return;
    require(logits.shape[1] >= valid_, kOp, "valid = {} is outside [1, {}], the number of logits", valid_,
            logits.shape[1]);
    require_shape(kOp, "ids", "b", ids, {b});
    require(static_cast<bool>(slots) || b == slots_, kOp, "{} rows of logits for {} slots", b, slots_);
    require_slots(kOp, ex.device == Device::cpu, slots, b, slots_);
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::sample(ex, {.logits = logits,
                                     .valid = valid_,
                                     .state = reinterpret_cast<Slot*>(state_.raw()),
                                     .seen = seen_.view<uint32_t, 2>(),
                                     .slots = slots.data,
                                     .ids = ids,
                                     .seen_before = seen_before});
    }
    for (int64_t i = 0; i < b; ++i) {
        const auto slot = static_cast<size_t>(slot_of(slots, i));
        auto& history = host_->histories[slot];
        if (seen_before) history.push_back(ids(i));
        ids(i) = host_->samplers[slot].sample({logits.row(i), static_cast<size_t>(logits.shape[1])}, valid_,
                                              history);
    }
}

}  // namespace ssm
