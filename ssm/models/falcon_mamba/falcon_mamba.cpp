#include "ssm/models/falcon_mamba/falcon_mamba.h"

#include "ssm/models/config_common.h"
#include "ssm/models/mamba/mamba.h"

namespace ssm::falcon_mamba {

bool matches(const ConfigReader& config) {
    return config.holds<std::string>("model_type") && config.get<std::string>("model_type") == "falcon_mamba";
}

ModelSpec read(const ConfigReader& config) {
    mamba::Config c = mamba::read_hugging_face(config);
    c.mixer.bcdt_norm_eps = config.get_or<float>("mixer_rms_eps", 1e-6f, between(0, 1));
    return mamba::make_spec(c, "falcon_mamba");
}

std::string new_config(const NewModel& shape) {
    auto config = nlohmann::ordered_json::parse(mamba::new_config(shape));
    config["architectures"] = {"FalconMambaForCausalLM"};
    config["model_type"] = "falcon_mamba";
    config["mixer_rms_eps"] = 1e-6;
    return to_text(config);
}

std::string convert_config(const ConfigReader& config, Layout) {
    config.reject("model_type", "has no mamba_ssm layout");
}

}  // namespace ssm::falcon_mamba
