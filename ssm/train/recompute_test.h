// The gradients of one batch, as the optimiser sees them, and the memory that they took: for the tests of
// what is recomputed, here and on a GPU.
#pragma once

#include <string>
#include <vector>

#include "ssm/core/random.h"
#include "ssm/models/registry.h"
#include "ssm/train/trained_language_model.h"

namespace ssm::test {

struct BatchGradients {
    std::vector<std::string> bytes;  // of the loss, then of each parameter's gradient
    size_t peak = 0;
};

// Three sequences of 96, 1 and 31 tokens through two layers; the second batch adds to the first's gradients.
inline BatchGradients gradients_of(const Exec& ex, const std::string& architecture,
                                   TrainedLanguageModel::Options options) {
    const NewModel shape{.vocab = 256, .e = 32, .layers = 2, .n = 16, .p = 16, .eos = 255};
    auto model = build_model(find_architecture(architecture).new_config(shape), "config");
    model->initialise(7);
    TrainedLanguageModel trained(ex, *model, options);
    Random random(5);
    Batch batch{.ids = {}, .targets = {}, .cu_seqlens = {0, 96, 97, 128}};
    for (int i = 0; i < 128; ++i) {
        batch.ids.push_back(static_cast<int32_t>(random.uniform(0, 256)));
        batch.targets.push_back(static_cast<int32_t>(random.uniform(-20, 256)));
    }
    const std::vector<Batch> batches{batch, batch};
    const std::vector<double> weights{0.75, 0.25};
    trained.set_batches(batches, weights);
    const Tensor loss = Tensor::zeros(ex, {1});
    const std::vector<TrainedParameter> parameters = trained.parameters();
    trained.add_gradients(loss);
    BatchGradients all;
    const auto add = [&](const Tensor& t) {
        const Tensor host = t.to_host();
        all.bytes.emplace_back(reinterpret_cast<const char*>(host.raw()), host.bytes());
    };
    add(loss);
    for (const TrainedParameter& p : parameters) add(p.grad);
    all.peak = ex.allocator->peak_bytes();
    return all;
}

}  // namespace ssm::test
