// A LanguageModel as the trainer sees it.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/models/language_model.h"
#include "ssm/train/trainable.h"

namespace ssm {

class TrainedLanguageModel final : public Trainable {
public:
    // `model` (f32, with values) must outlive this. Throws when a parameter is not f32.
    TrainedLanguageModel(Exec exec, LanguageModel& model);

    std::vector<TrainedParameter> parameters() override;
    double add_gradients(const Batch& batch, double weight) override;
    double loss(const Batch& batch) override;
    void save(const std::filesystem::path& folder) override;

private:
    Exec exec_;
    LanguageModel& model_;
};

}  // namespace ssm
