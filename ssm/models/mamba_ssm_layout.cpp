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

}  // namespace ssm::mamba_ssm_layout
