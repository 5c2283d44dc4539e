#include "ssm/models/mamba_ssm_layout.h"

#include "ssm/models/config_common.h"

namespace ssm::mamba_ssm_layout {

bool matches(const ConfigReader& config, std::string_view layer) {
    if (config.has("model_type") || !config.has("d_model") || !config.has("n_layer")) return false;
    return config.object("ssm_cfg").choice_or("layer", "Mamba1", {"Mamba1", "Mamba2"}) == layer;
}

Config read(const ConfigReader& config) {
    config.expect("rms_norm", true);
    config.expect("d_intermediate", int64_t{0});
    if (!config.get_or<std::vector<int64_t>>("attn_layer_idx", {}).empty()) {
        config.reject("attn_layer_idx", "is not supported: attention layers");
    }
    config.ignore({"attn_cfg", "residual_in_fp32", "fused_add_norm"});
    const auto vocab = config.get<int64_t>("vocab_size", kDimension);
    const auto multiple = config.get_or<int64_t>("pad_vocab_size_multiple", 8, kDimension);
    return {.e = config.get<int64_t>("d_model", kDimension),
            .layers = config.get<int64_t>("n_layer", kLayers),
            .vocab = (vocab + multiple - 1) / multiple * multiple,
            .tie_embeddings = config.get_or("tie_embeddings", true),
            .ssm_cfg = config.object("ssm_cfg")};
}

std::string text(int64_t e, int64_t layers, int64_t vocab, bool tie_embeddings,
                 const nlohmann::ordered_json& ssm_cfg) {
    return to_text({{"d_model", e},
                    {"d_intermediate", 0},
                    {"n_layer", layers},
                    {"vocab_size", vocab},
                    {"ssm_cfg", ssm_cfg},
                    {"attn_layer_idx", nlohmann::ordered_json::array()},
                    {"attn_cfg", nlohmann::ordered_json::object()},
                    {"rms_norm", true},
                    {"residual_in_fp32", true},
                    {"fused_add_norm", true},
                    {"pad_vocab_size_multiple", 1},
                    {"tie_embeddings", tie_embeddings}});
}

}  // namespace ssm::mamba_ssm_layout
