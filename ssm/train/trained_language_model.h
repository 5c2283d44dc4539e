// A LanguageModel as the trainer sees it.
//
// In bf16 (on a GPU) the model computes with matrices rounded to bf16, and the optimiser with their f32
// masters, which are what save() writes: a run's folder has the same form wherever it was trained.
#pragma once

#include <map>

#include "ssm/core/exec.h"
#include "ssm/core/transfer.h"
#include "ssm/models/language_model.h"
#include "ssm/train/trainable.h"

namespace ssm {

class TrainedLanguageModel final : public Trainable {
public:
    struct Options {
        DType dtype = DType::f32;  // of matrices and activations; bf16 needs a GPU
        Recompute recompute = Recompute::none;
    };
    // `model` (f32, with values) must outlive this; it is moved to the Exec's device. Throws when a parameter
    // is not f32.
    TrainedLanguageModel(Exec exec, LanguageModel& model);  // f32
    TrainedLanguageModel(Exec exec, LanguageModel& model, Options options);

    std::vector<TrainedParameter> parameters() override;
    void set_batches(std::span<const Batch> batches, std::span<const double> weights) override;
    void add_gradients(const Tensor& loss) override;
    double loss(const Batch& batch) override;
    void save(const std::filesystem::path& folder) override;
    double flop_per_token() const override;

private:
    struct Staged {
        HostInput ids, targets, weights;
        std::vector<int64_t> cu_seqlens = {};
        bool counts = false;
    };

    Exec exec_;
    LanguageModel& model_;
    Options options_;
    std::map<std::string, Tensor> masters_;  // of the matrices in bf16, by name
    std::vector<Staged> staged_;
};

}  // namespace ssm
