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

Session::Session(const Exec& ex, LanguageModel& model)
    : exec_(ex), model_(model), state_(model.new_state(1)) {}

void Session::consume(std::span<const int32_t> ids) {
    for (const int32_t id : ids) {
        require(0 <= id && id < model_.vocab(), "model", "token id {} is outside the vocabulary of {}", id,
                model_.vocab());
    }
    const auto count = static_cast<int64_t>(ids.size());
    for (int64_t begin = 0; begin < count;) {
        const int64_t t = std::min(kPrefillChunk, count - begin);
        const int64_t cu_seqlens[] = {0, t};
        Ctx ctx{.exec = exec_, .activation = model_.dtype()};
        if (t > 1) ctx.cu_seqlens = cu_seqlens;
        const Var hidden = model_.hidden(ctx, {ids.data() + begin, {t}}, &state_);
        begin += t;
        if (begin == count) logits_ = model_.logits(ctx, hidden.value().rows(t - 1, t)).to_host();
    }
    history_.insert(history_.end(), ids.begin(), ids.end());
}

std::span<const float> Session::logits() const {
    require(static_cast<bool>(logits_), "generate",
            "the prompt is empty: there is no token to continue from");
    return {logits_.data<const float>(), static_cast<size_t>(logits_.size())};
}

void Session::save(const std::filesystem::path& file, const Sampler& sampler) {
    require(static_cast<bool>(logits_), "state", "there is nothing to save: no token was read");
    std::vector<NamedTensor> tensors;
    state_.visit([&](const std::string& name, Tensor& t) { tensors.push_back({name, t.to_host()}); });
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
    state_ = std::move(state);
    logits_ = logits;
    history_.assign(first, first + ids.size());
}

}  // namespace ssm
