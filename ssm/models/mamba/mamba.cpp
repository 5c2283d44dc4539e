#include "ssm/models/mamba/mamba.h"

#include "ssm/models/config_common.h"
#include "ssm/models/mamba_ssm_layout.h"

namespace ssm::mamba {
namespace {

int64_t automatic_rank(int64_t e) { return (e + 15) / 16; }

Config read_mamba_ssm(const ConfigReader& config) {
    const auto shared = mamba_ssm_layout::read(config);
    const ConfigReader& s = shared.ssm_cfg;
    Config c{.layout = Layout::mamba_ssm};
    c.vocab = shared.vocab;
    c.tie_embeddings = shared.tie_embeddings;
    c.eos = {0};  // the gpt-neox-20b tokenizer's <|endoftext|>, with which these models were trained
    MambaConfig& m = c.mixer;
    m.e = shared.e;
    m.layers = shared.layers;
    m.n = s.get_or<int64_t>("d_state", 16, kDimension);
    m.k = s.get_or<int64_t>("d_conv", 4, between(2, 64));
    m.d = inner_width(s, m.e);
    m.r = s.holds<std::string>("dt_rank") || !s.has("dt_rank") ? automatic_rank(m.e)
                                                               : s.get<int64_t>("dt_rank", kDimension);
    if (s.holds<std::string>("dt_rank")) s.choice("dt_rank", {"auto"});
    m.projection_bias = s.get_or("bias", false);
    m.conv_bias = s.get_or("conv_bias", true);
    s.ignore({"layer", "use_fast_path", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"});
    return c;
}

Config read_config(const ConfigReader& config) {
    return config.has("model_type") ? read_hugging_face(config) : read_mamba_ssm(config);
}

std::string hugging_face_text(const Config& c) {
    const MambaConfig& m = c.mixer;
    nlohmann::ordered_json text = {{"architectures", {"MambaForCausalLM"}},
                                   {"model_type", "mamba"},
                                   {"vocab_size", c.vocab},
                                   {"hidden_size", m.e},
                                   {"intermediate_size", m.d},
                                   {"expand", shortest(static_cast<float>(m.d) / static_cast<float>(m.e))},
                                   {"state_size", m.n},
                                   {"num_hidden_layers", m.layers},
                                   {"conv_kernel", m.k},
                                   {"time_step_rank", m.r},
                                   {"use_bias", m.projection_bias},
                                   {"use_conv_bias", m.conv_bias},
                                   {"hidden_act", "silu"},
                                   {"layer_norm_epsilon", shortest(c.norm_eps)},
                                   {"residual_in_fp32", true},
                                   {"tie_word_embeddings", c.tie_embeddings},
                                   {"bos_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"eos_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"pad_token_id", c.eos.empty() ? 0 : c.eos.front()},
                                   {"dtype", "float32"}};
    write_first_steps(m, text);
    return to_text(text);
}

std::string mamba_ssm_text(const Config& c) {
    const MambaConfig& m = c.mixer;
    return mamba_ssm_layout::text(m.e, m.layers, c.vocab, c.tie_embeddings,
                                  {{"layer", "Mamba1"},
                                   {"d_state", m.n},
                                   {"d_conv", m.k},
                                   {"expand", shortest(static_cast<float>(m.d) / static_cast<float>(m.e))},
                                   {"dt_rank", m.r},
                                   {"bias", m.projection_bias},
                                   {"conv_bias", m.conv_bias}});
}

}  // namespace

Config read_hugging_face(const ConfigReader& config) {
    Config c;
    MambaConfig& m = c.mixer;
    c.vocab = config.get_or<int64_t>("vocab_size", 50280, kDimension);
    c.norm_eps = config.get_or<float>("layer_norm_epsilon", 1e-5f, between(0, 1));
    c.tie_embeddings = config.get_or("tie_word_embeddings", true);
    read_first_steps(config, m);
    c.eos = read_eos(config);
    m.e = config.get_or<int64_t>("hidden_size", 768, kDimension);
    m.layers = config.get_or<int64_t>("num_hidden_layers", 32, kLayers);
    m.n = config.get_or<int64_t>("state_size", 16, kDimension);
    m.k = config.get_or<int64_t>("conv_kernel", 4, between(2, 64));
    const bool given = config.has("intermediate_size");
    if (given) config.ignore({"expand"});
    m.d = given ? config.get<int64_t>("intermediate_size", kDimension) : inner_width(config, m.e);
    if (config.holds<std::string>("time_step_rank")) {
        config.choice("time_step_rank", {"auto"});
        m.r = automatic_rank(m.e);
    } else {
        m.r = config.get_or<int64_t>("time_step_rank", automatic_rank(m.e), kDimension);
    }
    m.projection_bias = config.get_or("use_bias", false);
    m.conv_bias = config.get_or("use_conv_bias", true);
    config.choice_or("hidden_act", "silu", {"silu", "swish"});
    // How a new model is drawn, how others compute it, and the original package's names for what was read
    // above.
    config.ignore({"model_type", "initializer_range", "rescale_prenorm_residual", "residual_in_fp32",
                   "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan",
                   "d_inner", "d_model", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm",
                   "pad_vocab_size_multiple"});
    return c;
}

ModelSpec make_spec(const Config& c, std::string_view architecture) {
    return mamba_ssm_layout::spec<MambaMixer>(c, architecture);
}

bool matches(const ConfigReader& config) {
    if (config.has("model_type"))
        return config.holds<std::string>("model_type") && config.get<std::string>("model_type") == "mamba";
    return mamba_ssm_layout::matches(config, "Mamba1");
}

ModelSpec read(const ConfigReader& config) { return make_spec(read_config(config), "mamba"); }

std::string new_config(const NewModel& shape) {
    Config c;
    c.vocab = shape.vocab;
    c.tie_embeddings = shape.tie_embeddings;
    c.eos = {shape.eos};
    c.mixer = {.e = shape.e,
               .d = shape.expand * shape.e,
               .n = shape.n > 0 ? shape.n : 16,
               .k = shape.k,
               .r = shape.dt_rank > 0 ? shape.dt_rank : automatic_rank(shape.e),
               .layers = shape.layers};
    draw_first_steps(shape, c.mixer);
    return hugging_face_text(c);
}

std::string convert_config(const ConfigReader& config, Layout to) {
    const Config c = read_config(config);
    if (to == Layout::hugging_face) return hugging_face_text(c);
    if (c.norm_eps != 1e-5f)
        config.reject("layer_norm_epsilon", "cannot be said in the mamba_ssm layout, only 1e-05");
    return mamba_ssm_text(c);
}

}  // namespace ssm::mamba
