// metrics.jsonl: one JSON object a line, the steps increasing.
//
//   {"step": 20, "tokens": 40960, "epoch": 0.1, "loss": 3.21, "learning_rate": 0.001, "gradient_norm": 0.9,
//    "tokens_per_second": 7200, "seconds": 5.7, "valid_loss": 3.1, "bits_per_byte": 4.5}
//
// `loss` is the mean over the steps since the line before, in nats per token; the last two only where the
// model was validated; there a task has "accuracy" instead of "bits_per_byte".
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>

namespace ssm {

struct MetricsRow {
    int64_t step = 0, tokens = 0;
    double epoch = 0, loss = 0, learning_rate = 0, gradient_norm = 0;
    double tokens_per_second = 0;
    double seconds = 0;  // of work since the start of the run, over all resumptions
    std::optional<double> valid_loss, bits_per_byte, accuracy;
};

class MetricsLog {
public:
    // Opens the file and drops every line after `step` (and a half-written one): a resumed run writes no line
    // twice. `last` receives the last line that stays. Throws Error (io).
    MetricsLog(std::filesystem::path path, int64_t step, std::optional<MetricsRow>& last);
    ~MetricsLog();
    MetricsLog(const MetricsLog&) = delete;
    MetricsLog& operator=(const MetricsLog&) = delete;

    void append(const MetricsRow& row);
    void sync();  // to the disk

private:
    [[noreturn]] void refuse() const;

    std::filesystem::path path_;
    std::FILE* file_ = nullptr;
};

}  // namespace ssm
