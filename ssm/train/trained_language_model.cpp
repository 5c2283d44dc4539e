#include "ssm/train/trained_language_model.h"

#include <algorithm>

#include "ssm/models/registry.h"
#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/elementwise/elementwise.h"

namespace ssm {
namespace {

View<const int32_t, 1> view(const std::vector<int32_t>& v) {
    return {v.data(), {static_cast<int64_t>(v.size())}};
}

}  // namespace

TrainedLanguageModel::TrainedLanguageModel(Exec exec, LanguageModel& model)
    : TrainedLanguageModel(std::move(exec), model, Options{}) {}

TrainedLanguageModel::TrainedLanguageModel(Exec exec, LanguageModel& model, Options options)
    : exec_(std::move(exec)), model_(model), options_(options) {
    require(options_.dtype == DType::f32 || exec_.device != Device::cpu, "train",
            "activations in bf16 need a GPU");
    model_.move_to(exec_);
    model_.require_grad();
    if (options_.dtype == DType::f32) return;
    model_.visit([&](const std::string& name, Parameter& p) {
        if (p.kind != Parameter::Kind::matrix) return;
        masters_[name] = p.value();
        p.var = Var(Tensor::empty(exec_, p.shape, DType::bf16), true);
        cast(exec_, masters_[name].view<const float, 2>(), p.value().view<bf16, 2>());
    });
}

std::vector<TrainedParameter> TrainedLanguageModel::parameters() {
    std::vector<TrainedParameter> all;
    model_.visit([&](const std::string& name, Parameter& p) {
        const auto master = masters_.find(name);
        const bool rounded = master != masters_.end();
        all.push_back({name, rounded ? master->second : p.value(), p.var.grad(exec_), p.weight_decay,
                       rounded ? p.value() : Tensor(), p.kind == Parameter::Kind::matrix});
    });
    return all;
}

void TrainedLanguageModel::set_batches(std::span<const Batch> batches, std::span<const double> weights) {
    const auto staged = [&](int64_t t) {
        return Staged{HostInput(exec_, {t}, DType::i32), HostInput(exec_, {t}, DType::i32),
                      HostInput(exec_, {t}, DType::f32)};
    };
    while (staged_.size() > batches.size()) staged_.pop_back();
    for (size_t i = 0; i < batches.size(); ++i) {
        const Batch& b = batches[i];
        model_.require_ids(view(b.ids));
        if (i == staged_.size())
            staged_.push_back(staged(b.tokens()));
        else if (staged_[i].ids.tensor().size() != b.tokens())
            staged_[i] = staged(b.tokens());
        Staged& s = staged_[i];
        const int64_t counted = b.counted();
        s.counts = counted > 0;
        s.cu_seqlens = b.cu_seqlens;
        std::ranges::copy(b.ids, s.ids.fill<int32_t>().begin());
        std::ranges::copy(b.targets, s.targets.fill<int32_t>().begin());
        const double each = s.counts ? weights[i] / static_cast<double>(counted) : 0.0;
        std::ranges::fill(s.weights.fill<float>(), static_cast<float>(each));
        s.ids.send();
        s.targets.send();
        s.weights.send();
    }
}

void TrainedLanguageModel::add_gradients(const Tensor& loss) {
    const auto scalar = [](const Tensor& t) { return t.reshape({1, 1}); };
    loss.fill_zero();
    // The first product that gives a matrix's gradient writes it; what none has written is zero.
    const auto of_matrices = [&](auto&& f) {
        model_.visit([&](const std::string&, Parameter& p) {
            if (p.kind == Parameter::Kind::matrix) f(p.var);
        });
    };
    of_matrices([&](const Var& v) { v.unset_grad(exec_); });
    for (const Staged& s : staged_) {
        if (!s.counts && exec_.device == Device::cpu) continue;
        Tape tape;
        Ctx ctx{.exec = exec_,
                .tape = &tape,
                .cu_seqlens = s.cu_seqlens,
                .activation = options_.dtype,
                .recompute = options_.recompute};
        const Var part = model_.loss(ctx, s.ids.tensor(), s.targets.tensor(), s.weights.tensor());
        accumulate(exec_, scalar(part.value()).view<const float, 2>(), scalar(loss).view<float, 2>());
        tape.backward();
    }
    of_matrices([&](const Var& v) { v.grad(exec_); });
}

double TrainedLanguageModel::loss(const Batch& batch) {
    // Weights change between calls, on a GPU by replayed steps that the model does not see: it keeps nothing.
    Ctx ctx{.exec = exec_,
            .cu_seqlens = batch.cu_seqlens,
            .activation = options_.dtype,
            .recomputed_later = true};
    return static_cast<double>(model_.loss(ctx, view(batch.ids), view(batch.targets)).value().item());
}

void TrainedLanguageModel::save(const std::filesystem::path& folder) {
    std::map<std::string, Tensor> rounded;
    const auto exchange = [&](const std::map<std::string, Tensor>& values, bool keep) {
        model_.visit([&](const std::string& name, Parameter& p) {
            const auto value = values.find(name);
            if (value == values.end()) return;
            if (keep) rounded[name] = p.value();
            p.var.set_value(value->second);
        });
    };
    exchange(masters_, true);
    save_model(model_, folder, {});
    exchange(rounded, false);
}

double TrainedLanguageModel::flop_per_token() const {
    return 6 * static_cast<double>(model_.matrix_elements());
}

}  // namespace ssm
