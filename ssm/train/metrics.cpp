#include "ssm/train/metrics.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "ssm/core/error.h"
#include "ssm/io/mapped_file.h"

namespace ssm {
namespace {

using Json = nlohmann::ordered_json;

std::string to_line(const MetricsRow& r) {
    Json o = {{"step", r.step},
              {"tokens", r.tokens},
              {"epoch", r.epoch},
              {"loss", r.loss},
              {"learning_rate", r.learning_rate},
              {"gradient_norm", r.gradient_norm},
              {"tokens_per_second", r.tokens_per_second},
              {"seconds", r.seconds}};
    if (r.valid_loss) o["valid_loss"] = *r.valid_loss;
    if (r.bits_per_byte) o["bits_per_byte"] = *r.bits_per_byte;
    if (r.accuracy) o["accuracy"] = *r.accuracy;
    return o.dump() + '\n';
}

std::optional<MetricsRow> from_line(std::string_view line) {
    const Json o = Json::parse(line, nullptr, false);
    if (!o.is_object() || !o.contains("step") || !o["step"].is_number_integer()) return std::nullopt;
    const auto number = [&](const char* key) {
        const auto it = o.find(key);
        return it != o.end() && it->is_number() ? std::optional(it->get<double>()) : std::nullopt;
    };
    MetricsRow r;
    r.step = o["step"].get<int64_t>();
    r.tokens = static_cast<int64_t>(number("tokens").value_or(0));
    r.epoch = number("epoch").value_or(0);
    r.loss = number("loss").value_or(0);
    r.learning_rate = number("learning_rate").value_or(0);
    r.gradient_norm = number("gradient_norm").value_or(0);
    r.tokens_per_second = number("tokens_per_second").value_or(0);
    r.seconds = number("seconds").value_or(0);
    r.valid_loss = number("valid_loss");
    r.bits_per_byte = number("bits_per_byte");
    r.accuracy = number("accuracy");
    return r;
}

// Length of the leading lines that are whole and not after `step`.
size_t keep_bytes(std::string_view text, int64_t step, std::optional<MetricsRow>& last) {
    size_t at = 0;
    for (;;) {
        const size_t end = text.find('\n', at);
        if (end == std::string_view::npos) return at;
        const auto row = from_line(text.substr(at, end - at));
        if (!row || row->step > step) return at;
        last = row;
        at = end + 1;
    }
}

}  // namespace

MetricsLog::MetricsLog(std::filesystem::path path, int64_t step, std::optional<MetricsRow>& last)
    : path_(std::move(path)) {
    size_t keep = 0;
    if (std::filesystem::exists(path_)) keep = keep_bytes(read_text_file(path_), step, last);
    file_ = std::fopen(path_.c_str(), "ab");
    if (file_ == nullptr || ::ftruncate(::fileno(file_), static_cast<off_t>(keep)) != 0) refuse();
}

MetricsLog::~MetricsLog() {
    if (file_ != nullptr) std::fclose(file_);
}

void MetricsLog::refuse() const {
    fail(ErrorCode::io, "train", "cannot write `{}`: {}", path_.string(), std::strerror(errno));
}

void MetricsLog::append(const MetricsRow& row) {
    const std::string line = to_line(row);
    if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0) refuse();
}

void MetricsLog::sync() {
    if (::fsync(::fileno(file_)) != 0) refuse();
}

}  // namespace ssm
