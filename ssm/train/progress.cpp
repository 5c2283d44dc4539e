#include "ssm/train/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace ssm {
namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string text_of(const ProgressStatus& s) {
    std::string text = fmt::format("{:3.0f}%  step {}  loss {:.4f}  lr {:.2e}  {:.0f} tokens/s",
                                   100 * s.share, s.step, s.loss, s.learning_rate, s.tokens_per_second);
    if (s.peak_share > 0) text += fmt::format(" ({:.0f}% of peak)", 100 * s.peak_share);
    if (s.memory > 0) text += fmt::format("  {:.2f} GB", static_cast<double>(s.memory) * 1e-9);
    if (s.valid_loss) text += fmt::format("  valid {:.4f}", *s.valid_loss);
    if (s.bits_per_byte) text += fmt::format(" ({:.4f} bits/byte)", *s.bits_per_byte);
    if (s.accuracy) text += fmt::format(" ({:.2f}% right)", 100 * *s.accuracy);
    return text + fmt::format("  {} left", format_duration(s.seconds_left));
}

}  // namespace

std::string format_duration(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0) return "?";
    const auto s = static_cast<int64_t>(std::llround(seconds));
    if (s >= 3600) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
    if (s >= 60) return fmt::format("{}m{:02}s", s / 60, s % 60);
    return fmt::format("{}s", s);
}

Progress::Progress(std::FILE* stream)
    : stream_(stream), terminal_(stream != nullptr && ::isatty(::fileno(stream)) == 1) {}

Progress::~Progress() { clear(); }

void Progress::clear() {
    if (!drawn_) return;
    std::fputs("\r\x1b[K", stream_);
    std::fflush(stream_);
    drawn_ = false;
}

void Progress::draw(const ProgressStatus& s) {
    constexpr int kWidth = 24;
    const int full = std::clamp(static_cast<int>(s.share * kWidth), 0, kWidth);
    std::fputs(
        fmt::format("\r\x1b[K[{}{}] {}", std::string(full, '='), std::string(kWidth - full, ' '), text_of(s))
            .c_str(),
        stream_);
    std::fflush(stream_);
    drawn_ = true;
    last_draw_ = now();
}

void Progress::update(const ProgressStatus& status) {
    if (terminal_ && now() - last_draw_ >= 0.1) draw(status);
}

void Progress::report(const ProgressStatus& status) {
    if (status.valid_loss || !terminal_) {
        note(text_of(status));
    }
    if (terminal_) draw(status);
}

void Progress::note(const std::string& text) {
    if (stream_ == nullptr) return;
    clear();
    std::fputs((text + "\n").c_str(), stream_);
    std::fflush(stream_);
}

}  // namespace ssm
