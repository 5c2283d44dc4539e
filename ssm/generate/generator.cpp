#include "ssm/generate/generator.h"

#include <algorithm>
#include <chrono>
#include <optional>

namespace ssm {

std::string StopFilter::push(const std::string& piece) {
    if (stopped_) return {};
    held_ += piece;
    size_t first = std::string::npos;
    for (const std::string& s : stop_) {
        if (!s.empty()) first = std::min(first, held_.find(s));
    }
    if (first != std::string::npos) {
        stopped_ = true;
        std::string shown = held_.substr(0, first);
        held_.clear();
        return shown;
    }
    // Hold back the longest tail that begins some stop string.
    size_t keep = 0;
    for (const std::string& s : stop_) {
        for (size_t n = std::min(s.empty() ? 0 : s.size() - 1, held_.size()); n > keep; --n) {
            if (held_.compare(held_.size() - n, n, s, 0, n) == 0) keep = n;
        }
    }
    std::string shown = held_.substr(0, held_.size() - keep);
    held_.erase(0, shown.size());
    return shown;
}

std::string StopFilter::flush() { return std::exchange(held_, {}); }

Generated generate(Session& session, Sampler& sampler, const Tokenizer* tokenizer, const LanguageModel& model,
                   const GenerateOptions& options, const std::function<void(const std::string&)>& on_text) {
    require(options.stop.empty() || tokenizer != nullptr, "generate", "stop strings need a tokenizer");
    const int64_t valid =
        tokenizer != nullptr ? std::min<int64_t>(tokenizer->size(), model.vocab()) : model.vocab();
    std::optional<StreamDecoder> decoder;
    if (tokenizer != nullptr) decoder.emplace(*tokenizer);
    StopFilter filter(options.stop);
    Generated out;
    const auto show = [&](const std::string& text) {
        if (text.empty()) return;
        out.text += text;
        if (on_text) on_text(text);
    };
    const auto start = std::chrono::steady_clock::now();
    while (static_cast<int64_t>(out.ids.size()) < options.max_tokens && !filter.stopped()) {
        const int32_t id = session.sample(sampler, valid);
        out.ids.push_back(id);
        session.consume({&id, 1});
        if (!options.ignore_eos && std::ranges::count(model.spec().eos, id) > 0) {
            out.reason = Generated::Reason::eos;
            break;
        }
        if (decoder) show(filter.push(decoder->push(id)));
    }
    out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (decoder && !filter.stopped()) {
        show(filter.push(decoder->flush()));
        show(filter.flush());
    }
    if (filter.stopped()) out.reason = Generated::Reason::stop;
    return out;
}

}  // namespace ssm
