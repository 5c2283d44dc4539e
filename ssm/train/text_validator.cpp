#include "ssm/train/text_validator.h"

#include <cmath>

namespace ssm {

TextValidator::TextValidator(Trainable& model, std::vector<WeightedFile> files, int64_t length, int64_t batch,
                             int64_t max_tokens)
    : model_(model), files_(std::move(files)), length_(length), batch_(batch), max_tokens_(max_tokens) {}

Validation TextValidator::validate() {
    Validation v;
    SequentialWindows windows(files_, length_, batch_, max_tokens_);
    Batch batch;
    double sum = 0;
    while (windows.next(batch)) {
        sum += model_.loss(batch) * static_cast<double>(batch.tokens());
        v.tokens += batch.tokens();
    }
    double tokens = 0, bytes = 0;
    for (const WeightedFile& f : files_) {
        tokens += static_cast<double>(f.tokens.tokens() - 1);
        bytes += static_cast<double>(f.tokens.text_bytes());
    }
    v.loss = sum / static_cast<double>(v.tokens);
    v.bits_per_byte = v.loss / std::log(2.0) * tokens / bytes;
    return v;
}

}  // namespace ssm
