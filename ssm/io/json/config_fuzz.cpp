// Any text as config.json: read like a model reads it, or one Error of one line.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "ssm/core/error.h"
#include "ssm/io/json/config_reader.h"

namespace {

void check(bool condition) {
    if (!condition) std::abort();
}

// Runs `f`; an Error is fine if its message is a line.
template <class F>
void attempt(F&& f) {
    try {
        f();
    } catch (const ssm::Error& e) {
        const std::string_view message = e.what();
        check(message.starts_with("[config] ") && message.size() < 2000);
        check(message.find('\n') == std::string_view::npos);
    }
}

void read(const ssm::ConfigReader& c) {
    using ssm::between, ssm::kDimension;
    attempt([&] { check(c.get<int64_t>({"hidden_size", "d_model"}, kDimension) >= 1); });
    attempt([&] { check(c.get_or<int>("n", 1, between(1, 8)) <= 8); });
    attempt([&] { check(!std::isnan(c.get<double>("eps", ssm::at_least(0)))); });
    attempt([&] { c.get<float>("f"); });
    attempt([&] { c.get<bool>("b"); });
    attempt([&] { c.get<std::string>("s"); });
    attempt([&] { check(c.choice_or("act", "silu", {"silu", "swish"}) != "gelu"); });
    attempt([&] { c.get<std::vector<int64_t>>("li"); });
    attempt([&] { c.get<std::vector<double>>("lf", ssm::at_least(0)); });
    attempt([&] { c.get<std::vector<std::string>>("ls"); });
    attempt([&] { c.expect("tie", true); });
    attempt([&] { c.require_divides("n", c.get<int64_t>("n"), "m", c.get_or<int64_t>("m", 8)); });
    check(!c.holds<bool>("b") || c.has("b"));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    attempt([&] {
        const auto c = ssm::ConfigReader::parse({reinterpret_cast<const char*>(data), size});
        read(c);
        attempt([&] { read(c.object("o")); });
        c.finish();
    });
    return 0;
}
