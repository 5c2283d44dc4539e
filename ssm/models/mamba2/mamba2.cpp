#include "ssm/models/mamba2/mamba2.h"

#include <cmath>

#include "ssm/models/config_common.h"
#include "ssm/models/mamba_ssm_layout.h"
#include "ssm/nn/mamba2.h"

namespace ssm::mamba2 {
namespace {

struct Config {
    Layout layout = Layout::hugging_face;
    Mamba2Config mixer;
    int64_t vocab = 50288, chunk = 256;
    float norm_eps = 1e-5f;
    bool tie_embeddings = true;
    std::vector<int32_t> eos;
};

// The width of B and of C is a size like any other.
void require_group_width(const ConfigReader& config, const char* key, const Mamba2Config& m) {
    if (static_cast<double>(m.g) * static_cast<double>(m.n) <= kDimension.high) return;
    config.reject(key, fmt::format("times the number of groups, {}, is too large", m.g));
}

void read_dt_limit(const ConfigReader& config, const char* key, Mamba2Config& m) {
    if (!config.has(key)) return config.ignore({key});
    const auto limit = config.get<std::vector<double>>(key);
    if (limit.size() != 2 || !(limit[0] <= limit[1]) || limit[0] < 0) {
        config.reject(key, "must be two increasing numbers >= 0");
    }
    m.dt_limit_min = static_cast<float>(limit[0]);
    m.dt_limit_max = static_cast<float>(limit[1]);
}

Config read_hugging_face(const ConfigReader& config) {
    Config c;
    Mamba2Config& m = c.mixer;
    c.vocab = config.get_or<int64_t>("vocab_size", 32768, kDimension);
    c.norm_eps = m.norm_eps = config.get_or<float>("layer_norm_epsilon", 1e-5f, between(0, 1));
    c.tie_embeddings = config.get_or("tie_word_embeddings", false);
    read_first_steps(config, m);
    c.eos = read_eos(config);
    c.chunk = config.get_or<int64_t>("chunk_size", 256,
                                     kDimension);  // how transformers splits the sum, not what it is
    m.e = config.get_or<int64_t>("hidden_size", 4096, kDimension);
    m.layers = config.get_or<int64_t>("num_hidden_layers", 64, kLayers);
    m.h = config.get_or<int64_t>("num_heads", 128, kDimension);
    m.p = config.get_or<int64_t>("head_dim", 64, kDimension);
    m.g = config.get_or<int64_t>("n_groups", 8, kDimension);
    m.n = config.get_or<int64_t>("state_size", 128, kDimension);
    m.k = config.get_or<int64_t>("conv_kernel", 4, between(2, 64));
    config.require_divides("n_groups", m.g, "num_heads", m.h);
    require_group_width(config, "state_size", m);
    const auto expand = config.get_or<double>("expand", 2.0, between(0.01, 64));
    if (std::llround(expand * static_cast<double>(m.e)) != m.d()) {
        config.reject(
            "expand",
            fmt::format("times 'hidden_size' = {} must equal 'num_heads' x 'head_dim' = {}", m.e, m.d()));
    }
    m.projection_bias = config.get_or("use_bias", false);
    m.conv_bias = config.get_or("use_conv_bias", true);
    read_dt_limit(config, "time_step_limit", m);
    config.choice_or("hidden_act", "silu", {"silu", "swish"});
    config.expect("rms_norm", true);
    // How a new model is drawn and how others compute it. transformers' code reads neither `norm_before_gate`
    // nor `time_step_rank` of this family; `intermediate_size` is h p.
    config.ignore({"model_type", "initializer_range", "rescale_prenorm_residual", "residual_in_fp32",
                   "time_step_scale", "time_step_init_scheme", "time_step_rank", "norm_before_gate",
                   "intermediate_size"});
    return c;
}

Config read_mamba_ssm(const ConfigReader& config) {
    const auto shared = mamba_ssm_layout::read(config);
    const ConfigReader& s = shared.ssm_cfg;
    Config c{.layout = Layout::mamba_ssm};
    Mamba2Config& m = c.mixer;
    c.vocab = shared.vocab;
    c.tie_embeddings = shared.tie_embeddings;
    c.eos = {0};  // the gpt-neox-20b tokenizer's <|endoftext|>, with which these models were trained
    m.e = shared.e;
    m.layers = shared.layers;
    const int64_t d = inner_width(s, m.e);
    m.p = s.get_or<int64_t>("headdim", 64, kDimension);
    s.require_divides("headdim", m.p, "expand * d_model", d);
    m.h = d / m.p;
    m.g = m.norm_groups = s.get_or<int64_t>("ngroups", 1, kDimension);
    s.require_divides("ngroups", m.g, "number of heads", m.h);
    m.n = s.get_or<int64_t>("d_state", 128, kDimension);
    require_group_width(s, "d_state", m);
    m.k = s.get_or<int64_t>("d_conv", 4, between(2, 64));
    c.chunk = s.get_or<int64_t>("chunk_size", 256, kDimension);
    m.projection_bias = s.get_or("bias", false);
    m.conv_bias = s.get_or("conv_bias", true);
    m.D_has_hdim = s.get_or("D_has_hdim", false);
    m.norm_before_gate = s.get_or("norm_before_gate", false);
    read_dt_limit(s, "dt_limit", m);
    s.expect("rmsnorm", true);
    s.expect("d_ssm", d);
    s.ignore({"layer", "use_mem_eff_path", "A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor"});
    return c;
}

Config read_config(const ConfigReader& config) {
    return config.has("model_type") ? read_hugging_face(config) : read_mamba_ssm(config);
}

nlohmann::ordered_json limit_json(const Mamba2Config& m) {
    if (std::isinf(m.dt_limit_max)) return {m.dt_limit_min, {{"__float__", "Infinity"}}};
    return {m.dt_limit_min, m.dt_limit_max};
}

std::string hugging_face_text(const Config& c) {
    const Mamba2Config& m = c.mixer;
    nlohmann::ordered_json text = {{"architectures", {"Mamba2ForCausalLM"}},
                                   {"model_type", "mamba2"},
                                   {"vocab_size", c.vocab},
                                   {"hidden_size", m.e},
                                   {"expand", shortest(static_cast<float>(m.d()) / static_cast<float>(m.e))},
                                   {"num_heads", m.h},
                                   {"head_dim", m.p},
                                   {"n_groups", m.g},
                                   {"state_size", m.n},
                                   {"num_hidden_layers", m.layers},
                                   {"conv_kernel", m.k},
                                   {"chunk_size", c.chunk},
                                   {"use_bias", m.projection_bias},
                                   {"use_conv_bias", m.conv_bias},
                                   {"hidden_act", "silu"},
                                   {"layer_norm_epsilon", shortest(c.norm_eps)},
                                   {"residual_in_fp32", true},
                                   {"time_step_limit", limit_json(m)},
                                   {"tie_word_embeddings", c.tie_embeddings},
                                   {"bos_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"eos_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"pad_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"dtype", "float32"}};
    write_first_steps(m, text);
    return to_text(text);
}

std::string mamba_ssm_text(const Config& c) {
    const Mamba2Config& m = c.mixer;
    nlohmann::ordered_json ssm_cfg = {
        {"layer", "Mamba2"},       {"d_state", m.n},
        {"d_conv", m.k},           {"expand", shortest(static_cast<float>(m.d()) / static_cast<float>(m.e))},
        {"headdim", m.p},          {"ngroups", m.g},
        {"chunk_size", c.chunk},   {"bias", m.projection_bias},
        {"conv_bias", m.conv_bias}};
    if (m.D_has_hdim) ssm_cfg["D_has_hdim"] = true;
    if (m.norm_before_gate) ssm_cfg["norm_before_gate"] = true;
    if (m.dt_limit_min > 0 || !std::isinf(m.dt_limit_max)) ssm_cfg["dt_limit"] = limit_json(m);
    return mamba_ssm_layout::text(m.e, m.layers, c.vocab, c.tie_embeddings, ssm_cfg);
}

}  // namespace

bool matches(const ConfigReader& config) {
    if (config.has("model_type"))
        return config.holds<std::string>("model_type") && config.get<std::string>("model_type") == "mamba2";
    return mamba_ssm_layout::matches(config, "Mamba2");
}

ModelSpec read(const ConfigReader& config) {
    return mamba_ssm_layout::spec<Mamba2Mixer>(read_config(config), "mamba2");
}

std::string new_config(const NewModel& shape) {
    Config c;
    c.vocab = shape.vocab;
    c.tie_embeddings = shape.tie_embeddings;
    c.eos = {shape.eos};
    Mamba2Config& m = c.mixer;
    m.e = shape.e;
    m.layers = shape.layers;
    m.p = shape.p > 0 ? shape.p : 64;
    require(shape.expand * shape.e % m.p == 0, "model",
            "the inner width {} is not a multiple of the head dimension {}", shape.expand * shape.e, m.p);
    m.h = shape.expand * shape.e / m.p;
    m.g = shape.g;
    require(m.h % m.g == 0, "model", "{} heads do not divide into {} groups", m.h, m.g);
    m.n = shape.n > 0 ? shape.n : 128;
    m.k = shape.k;
    draw_first_steps(shape, m);
    return hugging_face_text(c);
}

std::string convert_config(const ConfigReader& config, Layout to) {
    const Config c = read_config(config);
    const Mamba2Config& m = c.mixer;
    // The two packages differ in the groups of the gated norm; with one group they are the same.
    if (m.g != 1)
        config.reject(c.layout == Layout::mamba_ssm ? "ssm_cfg" : "n_groups",
                      "means another norm in the other layout");
    if (to == Layout::mamba_ssm) {
        if (c.norm_eps != 1e-5f)
            config.reject("layer_norm_epsilon", "cannot be said in the mamba_ssm layout, only 1e-05");
        return mamba_ssm_text(c);
    }
    if (m.D_has_hdim || m.norm_before_gate)
        config.reject("ssm_cfg", "cannot be said in transformers' layout");
    return hugging_face_text(c);
}

}  // namespace ssm::mamba2
