// What a person sees while a model trains: one line that is drawn over on a terminal, a plain line a
// reported step elsewhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

namespace ssm {

struct ProgressStatus {
    int64_t step = 0;
    double share = 0;       // of the run that is done, [0, 1]
    double peak_share = 0;  // of the machine's arithmetic that the step uses; 0: not known
    size_t memory = 0;      // bytes that the run held at most; 0: not known
    double loss = 0, learning_rate = 0, tokens_per_second = 0, seconds_left = 0;
    std::optional<double> valid_loss, bits_per_byte, accuracy;
};

class Progress {
public:
    // A null stream: silent.
    explicit Progress(std::FILE* stream);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    // Every step; drawn at most ten times a second, on a terminal.
    void update(const ProgressStatus& status);
    // A step that metrics.jsonl has too.
    void report(const ProgressStatus& status);
    // A line of its own.
    void note(const std::string& text);

private:
    void draw(const ProgressStatus& status);
    void clear();

    std::FILE* stream_;
    bool terminal_ = false, drawn_ = false;
    double last_draw_ = -1;
};

// "1h02m", "3m07s", "12s"
std::string format_duration(double seconds);

}  // namespace ssm
