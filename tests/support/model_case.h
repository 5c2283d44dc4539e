// A small random model, built by the library from the text of a config.json, and its f64 reference.
#pragma once

#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "ssm/models/registry.h"
#include "tests/support/compare.h"
#include "tests/support/reference_model.h"

namespace ssm::test {

inline nlohmann::json json_limit(double low, double high) {
    nlohmann::json limit = {low, high};
    if (std::isinf(high)) limit[1] = {{"__float__", "Infinity"}};
    return limit;
}

// transformers' config.json of the shape; mamba_ssm's where the shape says so by its embedding's name.
inline std::string config_text(const ReferenceShape& s) {
    nlohmann::json c;
    const bool second = s.kind == ReferenceShape::Kind::mamba2;
    if (s.embedding == "backbone.embedding.weight") {
        nlohmann::json cfg = {{"layer", second ? "Mamba2" : "Mamba1"},
                              {"d_state", s.n},
                              {"d_conv", s.k},
                              {"expand", static_cast<double>(s.d) / static_cast<double>(s.e)},
                              {"bias", s.projection_bias},
                              {"conv_bias", s.conv_bias}};
        if (second) {
            cfg.update({{"headdim", s.p},
                        {"ngroups", s.g},
                        {"D_has_hdim", s.D_has_hdim},
                        {"norm_before_gate", s.norm_before_gate},
                        {"dt_limit", json_limit(s.dt_min, s.dt_max)}});
        } else {
            cfg["dt_rank"] = s.r;
        }
        c = {{"d_model", s.e},   {"n_layer", s.layers},          {"vocab_size", s.vocab},   {"ssm_cfg", cfg},
             {"rms_norm", true}, {"pad_vocab_size_multiple", 1}, {"tie_embeddings", s.tied}};
        return c.dump();
    }
    c = {{"model_type", second           ? "mamba2"
                        : s.bcdt_eps > 0 ? "falcon_mamba"
                                         : "mamba"},
         {"vocab_size", s.vocab},
         {"hidden_size", s.e},
         {"num_hidden_layers", s.layers},
         {"state_size", s.n},
         {"conv_kernel", s.k},
         {"expand", static_cast<double>(s.d) / static_cast<double>(s.e)},
         {"use_bias", s.projection_bias},
         {"use_conv_bias", s.conv_bias},
         {"layer_norm_epsilon", s.norm_eps},
         {"tie_word_embeddings", s.tied}};
    if (second) {
        c.update({{"num_heads", s.h},
                  {"head_dim", s.p},
                  {"n_groups", s.g},
                  {"time_step_limit", json_limit(s.dt_min, s.dt_max)}});
    } else {
        c.update({{"intermediate_size", s.d}, {"time_step_rank", s.r}});
        if (s.bcdt_eps > 0) c["mixer_rms_eps"] = s.bcdt_eps;
    }
    return c.dump();
}

inline void copy_parameters(LanguageModel& model, ReferenceModel& reference) {
    reference.parameters.clear();
    model.visit([&](const std::string& name, Parameter& p) {
        const Tensor value = p.value().to(DType::f32);
        std::vector<double>& copy = reference.parameters[name];
        for (int64_t i = 0; i < value.size(); ++i) copy.push_back(value.data<const float>()[i]);
    });
}

struct ModelCase {
    std::unique_ptr<LanguageModel> model;
    ReferenceModel reference;

    // Every parameter away from its neutral start: biases not 0, norms and D not 1.
    explicit ModelCase(const ReferenceShape& shape, uint64_t seed = 1, DType dtype = DType::f32)
        : model(build_model(config_text(shape), "config")) {
        model->initialise(seed);
        Random random(seed);
        model->visit([&](const std::string&, Parameter& p) {
            const float spread = p.kind == Parameter::Kind::matrix ? 0.2f : 0.4f;
            for (int64_t i = 0; i < p.value().size(); ++i)
                p.value().data<float>()[i] += random.uniform(-spread, spread);
            if (p.kind == Parameter::Kind::matrix) p.var = Var(p.value().to(dtype));
        });
        reference.shape = shape;
        copy_parameters(*model, reference);
    }
};

// Sequences one after another: random ids, and the next id as target where there is one.
struct PackedTokens {
    std::vector<int32_t> ids, targets;
    std::vector<int64_t> cu_seqlens{0};

    PackedTokens(const std::vector<int64_t>& lengths, int64_t vocab, uint64_t seed = 7) {
        Random random(seed);
        for (const int64_t length : lengths) {
            for (int64_t i = 0; i < length; ++i) {
                ids.push_back(static_cast<int32_t>(random.integer(0, vocab - 1)));
                if (i > 0) targets.push_back(ids.back());
            }
            if (length > 0) targets.push_back(-1);
            cu_seqlens.push_back(static_cast<int64_t>(ids.size()));
        }
    }
    int64_t size() const { return static_cast<int64_t>(ids.size()); }
};

// Logits [t v] of tokens cu_seqlens splits (empty: a step), from and into `state` where there is one.
inline std::vector<float> run_logits(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids,
                                     CuSeqlens cu_seqlens, ModelState* state = nullptr) {
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens, .activation = model.dtype()};
    const Var hidden = model.hidden(ctx, {ids.data(), {static_cast<int64_t>(ids.size())}}, state);
    const Tensor logits = model.logits(ctx, hidden.value());
    return {logits.data<const float>(), logits.data<const float>() + logits.size()};
}

// A state as numbers: of each layer conv, then ssm.
inline std::vector<float> state_values(ModelState& state) {
    std::vector<float> values;
    state.visit([&](const std::string&, Tensor& t) {
        const Tensor f = t.to(DType::f32);
        values.insert(values.end(), f.data<const float>(), f.data<const float>() + f.size());
    });
    return values;
}
inline std::vector<double> state_values(const std::vector<ReferenceState>& states) {
    std::vector<double> values;
    for (const ReferenceState& s : states) {
        values.insert(values.end(), s.conv.begin(), s.conv.end());
        values.insert(values.end(), s.ssm.begin(), s.ssm.end());
    }
    return values;
}

}  // namespace ssm::test
