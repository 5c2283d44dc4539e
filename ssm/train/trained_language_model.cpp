#include "ssm/train/trained_language_model.h"

#include "ssm/models/registry.h"

namespace ssm {
namespace {

View<const int32_t, 1> view(const std::vector<int32_t>& v) {
    return {v.data(), {static_cast<int64_t>(v.size())}};
}

}  // namespace

TrainedLanguageModel::TrainedLanguageModel(Exec exec, LanguageModel& model)
    : exec_(std::move(exec)), model_(model) {
    model_.require_grad();
}

std::vector<TrainedParameter> TrainedLanguageModel::parameters() {
    std::vector<TrainedParameter> all;
    model_.visit([&](const std::string& name, Parameter& p) {
        all.push_back({name, p.value(), p.var.grad(exec_), p.weight_decay});
    });
    return all;
}

double TrainedLanguageModel::add_gradients(const Batch& batch, double weight) {
    Tape tape;
    Ctx ctx{.exec = exec_, .tape = &tape, .cu_seqlens = batch.cu_seqlens};
    const Var loss = model_.loss(ctx, view(batch.ids), view(batch.targets), static_cast<float>(weight));
    tape.backward();
    return static_cast<double>(loss.value().item());
}

double TrainedLanguageModel::loss(const Batch& batch) {
    Ctx ctx{.exec = exec_, .cu_seqlens = batch.cu_seqlens};
    return static_cast<double>(model_.loss(ctx, view(batch.ids), view(batch.targets)).value().item());
}

void TrainedLanguageModel::save(const std::filesystem::path& folder) { save_model(model_, folder, {}); }

}  // namespace ssm
