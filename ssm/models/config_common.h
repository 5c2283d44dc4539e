// Keys that every Hugging Face config of the Mamba families has.
#pragma once

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include "ssm/io/json/config_reader.h"
#include "ssm/models/registry.h"

namespace ssm {

// Layers are built before the weights are looked at, so their number has a limit of its own.
inline constexpr Range kLayers{1, 4096};

// The inner width expand * e; `expand` may be a fraction, but something must be left.
inline int64_t inner_width(const ConfigReader& config, int64_t e) {
    const auto expand = config.get_or<double>("expand", 2.0, between(0.01, 64));
    const auto d = static_cast<int64_t>(expand * static_cast<double>(e));
    if (d < 1) config.reject("expand", "leaves no inner width");
    return d;
}

// "eos_token_id": an id, a list of ids, or null.
inline std::vector<int32_t> read_eos(const ConfigReader& config) {
    if (!config.has("eos_token_id")) {
        config.ignore({"eos_token_id"});
        return {};
    }
    constexpr Range kId = between(-1, 2147483647);
    if (config.holds<int64_t>("eos_token_id"))
        return {static_cast<int32_t>(config.get<int64_t>("eos_token_id", kId))};
    const auto ids = config.get<std::vector<int64_t>>("eos_token_id", kId);
    return {ids.begin(), ids.end()};
}

// 1e-05 and not 9.999999747378752e-06; 2 and not 2.0, since transformers wants an integer where one is meant.
inline nlohmann::ordered_json shortest(float x) {
    if (x == std::floor(x) && std::abs(x) < 1e9f) return static_cast<int64_t>(x);
    return nlohmann::ordered_json::parse(fmt::format("{}", x));
}

// The range that a new model's step sizes softplus(dt_bias) are drawn from, by transformers' names: it
// decides how a model starts, not what it computes. `Mixer` has dt_min, dt_max, dt_floor. Written where it is
// not the usual one; the mamba_ssm layout does not say it.
template <class Mixer>
void read_first_steps(const ConfigReader& config, Mixer& m) {
    constexpr Range kStep = between(0, 1e6);
    m.dt_min = std::max(config.get_or<double>("time_step_min", m.dt_min, kStep), 1e-30);
    m.dt_max = std::max(config.get_or<double>("time_step_max", m.dt_max, kStep), 1e-30);
    m.dt_floor = config.get_or<double>("time_step_floor", m.dt_floor, kStep);
}
template <class Mixer>
void write_first_steps(const Mixer& m, nlohmann::ordered_json& config) {
    const Mixer usual{};
    if (m.dt_min == usual.dt_min && m.dt_max == usual.dt_max && m.dt_floor == usual.dt_floor) return;
    config["time_step_min"] = m.dt_min;
    config["time_step_max"] = m.dt_max;
    config["time_step_floor"] = m.dt_floor;
}
template <class Mixer>
void draw_first_steps(const NewModel& shape, Mixer& m) {
    if (shape.dt_min > 0) m.dt_min = m.dt_floor = shape.dt_min;
    if (shape.dt_max > 0) m.dt_max = shape.dt_max;
    require(m.dt_min <= m.dt_max && m.dt_max < 1e6, "model", "step sizes from {} to {} are no range",
            m.dt_min, m.dt_max);
}

// A config as text, the way Hugging Face writes it.
inline std::string to_text(const nlohmann::ordered_json& config) { return config.dump(2) + "\n"; }

}  // namespace ssm
