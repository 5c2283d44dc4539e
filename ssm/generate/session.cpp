#include "ssm/generate/session.h"

#include <charconv>
#include <cstring>

#include "ssm/io/safetensors/safetensors.h"

namespace ssm {
namespace {

constexpr std::string_view kFormat = "ssm.cpp session 1";

uint64_t parse_u64(const std::string& text, const std::string& file, const char* key) {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        fail(ErrorCode::bad_file, "state", "{}: '{}' is not a number: \"{}\"", file, key, text);
    }
    return value;
}

}  // namespace

Session::Session(const Exec& ex, LanguageModel& model, DType states)
    : exec_(ex), model_(model), decoder_(ex, model, 1, states) {}

void Session::consume(std::span<const int32_t> ids) {
    if (ids.empty()) return;
    if (ids.size() == 1 && chosen_ == ids[0]) {
        decoder_.step();
    } else {
        decoder_.read(0, ids);
    }
    chosen_.reset();
    if (sampling_ && sampling_->temperature != 0) ++draws_;  // the device has chosen what follows
    logits_ = {};
    history_.insert(history_.end(), ids.begin(), ids.end());
}

int32_t Session::sample(Sampler& sampler, int64_t valid) {
    if (exec_.device == Device::cpu) return sampler.sample(logits(), valid, history_);
    require(!history_.empty(), "generate", "the prompt is empty: there is no token to continue from");
    const SamplerOptions& options = sampler.options();
    const bool random = options.temperature != 0, plain = !random && options.repetition_penalty == 1;
    // Has the device drawn what this sampler would draw now?
    if (sampling_ != options || (random && draws_ != sampler.draws() + 1)) {
        decoder_.set_valid(valid);
        if (!plain || decoder_.has_samplers()) decoder_.set_sampler(0, options, sampler.draws(), history_);
        decoder_.choose_again();
        sampling_ = options;
        draws_ = sampler.draws() + (random ? 1 : 0);
    }
    chosen_ = decoder_.next_ids().front();
    if (random) sampler.set_draws(draws_);
    return *chosen_;
}

std::span<const float> Session::logits() const {
    require(!history_.empty(), "generate", "the prompt is empty: there is no token to continue from");
    if (!logits_) logits_ = decoder_.logits().to_host();
    return {logits_.data<const float>(), static_cast<size_t>(logits_.size())};
}

void Session::save(const std::filesystem::path& file, const Sampler& sampler) {
    require(!history_.empty(), "state", "there is nothing to save: no token was read");
    logits();
    std::vector<NamedTensor> tensors;
    ModelState state = model_.new_state(1);
    decoder_.save(0, state);
    state.visit([&](const std::string& name, Tensor& t) { tensors.push_back({name, t.to_host()}); });
    tensors.push_back({"logits", logits_});
    Tensor history = Tensor::empty({static_cast<int64_t>(history_.size())}, DType::i32);
    std::memcpy(history.raw(), history_.data(), history.bytes());
    tensors.push_back({"history", history});
    write_safetensors(file, tensors,
                      {{"format", std::string(kFormat)},
                       {"model", std::to_string(model_.fingerprint())},
                       {"draws", std::to_string(sampler.draws())}});
}

void Session::load(const std::filesystem::path& file, Sampler& sampler) {
    const std::string shown = file.string();
    const SafetensorsFile saved = SafetensorsFile::open(file);
    const auto& metadata = saved.metadata();
    const auto text = [&](const char* key) {
        const auto it = metadata.find(key);
        if (it == metadata.end())
            fail(ErrorCode::bad_file, "state", "{} is not a saved state: '{}' is missing", shown, key);
        return it->second;
    };
    if (text("format") != kFormat) {
        fail(ErrorCode::bad_file, "state", "{} is not a saved state of this version (\"{}\")", shown,
             kFormat);
    }
    if (parse_u64(text("model"), shown, "model") != model_.fingerprint()) {
        fail(ErrorCode::bad_file, "state", "{} was saved with another model or another dtype", shown);
    }
    // Read everything before anything changes.
    const auto read = [&](const std::string& name, const Shape& shape, DType dtype) {
        const Tensor t = saved.tensor(name);
        if (t.dtype() != dtype || t.shape() != shape) {
            fail(ErrorCode::bad_file, "state", "{}: '{}' must be {} {} but is {} {}", shown, name,
                 name_of(dtype), to_string(shape), name_of(t.dtype()), to_string(t.shape()));
        }
        return t.clone();
    };
    ModelState state = model_.new_state(1);
    state.visit([&](const std::string& name, Tensor& t) { t = read(name, t.shape(), t.dtype()).to(exec_); });
    const Tensor logits = read("logits", {1, model_.vocab()}, DType::f32);
    const Tensor ids = read("history", {saved.tensor("history").size()}, DType::i32);
    const auto* first = ids.data<const int32_t>();
    for (int64_t i = 0; i < ids.size(); ++i) {
        if (first[i] < 0 || first[i] >= model_.vocab()) {
            fail(ErrorCode::bad_file, "state", "{}: token id {} is outside the vocabulary of {}", shown,
                 first[i], model_.vocab());
        }
    }
    sampler.set_draws(parse_u64(text("draws"), shown, "draws"));
    decoder_.load(0, state, logits);
    sampling_.reset();
    chosen_.reset();
    logits_ = logits;
    history_.assign(first, first + ids.size());
}

}  // namespace ssm
