// Validation on texts: mean negative log-likelihood in consecutive windows.
#pragma once

#include <vector>

#include "ssm/train/sampler.h"
#include "ssm/train/trainable.h"
#include "ssm/train/validator.h"

namespace ssm {

class TextValidator final : public Validator {
public:
    // Windows of `length`, `batch` of them at a time, at most `max_tokens` predictions (0: all). `model` must
    // outlive this.
    TextValidator(Trainable& model, std::vector<WeightedFile> files, int64_t length, int64_t batch,
                  int64_t max_tokens = 0);
    Validation validate() override;

private:
    Trainable& model_;
    std::vector<WeightedFile> files_;
    int64_t length_, batch_, max_tokens_;
};

}  // namespace ssm
