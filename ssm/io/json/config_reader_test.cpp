#include "ssm/io/json/config_reader.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/support/shared.h"
#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using test::error_of;

ConfigReader read(std::string_view text) { return ConfigReader::parse(text); }

// The error of reading key "k" as a T from {"k": value}.
template <class T>
std::string get_error(const std::string& value, Range range = {}) {
    return error_of([&] { read("{\"k\": " + value + "}").get<T>("k", range); });
}

TEST(ConfigReader, TypedValues) {
    const auto c = read(R"({"i": 3, "big": 9000000000, "f": 1.5, "one": 1, "b": true, "s": "x", "li": [1, 2],
                            "lf": [0.0, {"__float__": "Infinity"}], "inf": Infinity, "ls": ["a"], "le": []})");
    EXPECT_EQ(c.get<int>("i"), 3);
    EXPECT_EQ(c.get<int64_t>("big"), 9'000'000'000);
    EXPECT_EQ(c.get<double>("f"), 1.5);
    EXPECT_EQ(c.get<float>("one"), 1.0f);
    EXPECT_TRUE(c.get<bool>("b"));
    EXPECT_EQ(c.get<std::string>("s"), "x");
    EXPECT_EQ(c.get<std::vector<int64_t>>("li"), (std::vector<int64_t>{1, 2}));
    EXPECT_EQ(c.get<std::vector<double>>("lf"), (std::vector<double>{0.0, INFINITY}));
    EXPECT_EQ(c.get<float>("inf"), INFINITY);
    EXPECT_EQ(c.get<std::vector<std::string>>("ls"), std::vector<std::string>{"a"});
    EXPECT_TRUE(c.get<std::vector<int64_t>>("le").empty());
    c.finish();
}

TEST(ConfigReader, DefaultsNullAndAlternatives) {
    const auto c =
        read(R"({"d_model": 8, "nothing": null, "n_layer": 2, "num_hidden_layers": 2, "rank": "auto"})");
    EXPECT_EQ(c.get<int>({"hidden_size", "d_model"}), 8);
    EXPECT_EQ(c.get_or<int>("nothing", 5), 5);
    EXPECT_EQ(c.get_or<int>("absent", 6), 6);
    EXPECT_EQ(c.get<int>({"num_hidden_layers", "n_layer"}), 2);
    EXPECT_FALSE(c.has("nothing"));
    EXPECT_TRUE(c.holds<std::string>("rank"));
    EXPECT_FALSE(c.holds<int64_t>("rank"));
    EXPECT_EQ(c.choice("rank", {"auto"}), "auto");
    EXPECT_EQ(c.choice_or("absent", "silu", {"silu", "swish"}), "silu");
    c.finish();
    EXPECT_EQ(error_of([] {
                  read(R"({"a": 1, "b": 2})").get<int>({"a", "b"});
              }),
              "[config] 'a' = 1 contradicts 'b' = 2");
}

TEST(ConfigReader, ErrorsOfType) {
    EXPECT_EQ(error_of([] { read("{}").get<int64_t>("hidden_size"); }), "[config] 'hidden_size' is missing");
    EXPECT_EQ(error_of([] { read("{\"k\": null}").get<int64_t>({"h", "k"}); }), "[config] 'h' is missing");
    EXPECT_EQ(get_error<int64_t>("\"abc\""), "[config] 'k' must be an integer but is \"abc\"");
    EXPECT_EQ(get_error<int64_t>("4.0"), "[config] 'k' must be an integer but is 4.0");
    EXPECT_EQ(get_error<int64_t>("true"), "[config] 'k' must be an integer but is true");
    EXPECT_EQ(get_error<double>("[1]"), "[config] 'k' must be a number but is [1]");
    EXPECT_EQ(get_error<double>("{\"__float__\": \"x\"}"),
              "[config] 'k' must be a number but is {\"__float__\":\"x\"}");
    EXPECT_EQ(get_error<bool>("1"), "[config] 'k' must be true or false but is 1");
    EXPECT_EQ(get_error<std::string>("NaN"), "[config] 'k' must be a string but is NaN");
    EXPECT_EQ(get_error<std::vector<double>>("2"), "[config] 'k' must be a list but is 2");
    EXPECT_EQ(get_error<std::vector<double>>("[0, \"x\"]"), "[config] 'k'[1] must be a number but is \"x\"");
    EXPECT_EQ(get_error<int>("\"" + std::string(500, 'x') + "\"").size(),
              std::string("[config] 'k' must be an integer but is ").size() + 63);
}

TEST(ConfigReader, ErrorsOfRange) {
    EXPECT_EQ(get_error<int64_t>("0", at_least(1)), "[config] 'k' = 0 must be >= 1");
    EXPECT_EQ(get_error<int64_t>("9", between(1, 8)), "[config] 'k' = 9 must be in 1..8");
    EXPECT_EQ(get_error<int64_t>("3000000000", kDimension),
              "[config] 'k' = 3000000000 must be in 1..2147483647");
    EXPECT_EQ(get_error<double>("NaN", at_least(0)), "[config] 'k' = NaN must be >= 0");
    EXPECT_EQ(get_error<double>("-Infinity", at_least(0)), "[config] 'k' = -Infinity must be >= 0");
    EXPECT_EQ(get_error<std::vector<double>>("[1, -1]", at_least(0)), "[config] 'k'[1] = -1 must be >= 0");
    EXPECT_EQ(get_error<int>("3000000000"), "[config] 'k' = 3000000000 is too large");
    EXPECT_EQ(get_error<int64_t>("18446744073709551615"), "[config] 'k' = 18446744073709551615 is too large");
    EXPECT_EQ(get_error<float>("1e300"), "[config] 'k' = 1e+300 is too large");
    EXPECT_EQ(get_error<int64_t>("8", between(1, 8)), "(no error)");
    EXPECT_EQ(get_error<int64_t>("1", between(1, 8)), "(no error)");
    EXPECT_EQ(get_error<double>("NaN"), "(no error)");
}

TEST(ConfigReader, ErrorsOfMeaning) {
    const auto c = read(R"({"n_groups": 3, "num_heads": 8, "act": "gelu", "bias": true, "ssm": {"n": 3}})");
    EXPECT_EQ(error_of([&] { c.require_divides("n_groups", 3, "num_heads", 8); }),
              "[config] 'n_groups' = 3 does not divide 'num_heads' = 8");
    EXPECT_EQ(error_of([&] { c.object("ssm").require_divides("n", 0, "m", 8); }),
              "[config] 'ssm.n' = 0 does not divide 'ssm.m' = 8");
    c.require_divides("n_groups", 4, "num_heads", 8);
    EXPECT_EQ(error_of([&] {
                  c.choice("act", {"silu", "swish"});
              }),
              "[config] 'act' = \"gelu\" is not supported, only silu, swish");
    EXPECT_EQ(error_of([&] { c.expect("bias", false); }),
              "[config] 'bias' = true is not supported, only false");
    EXPECT_EQ(error_of([&] { c.expect("act", "silu"); }),
              "[config] 'act' = \"gelu\" is not supported, only silu");
    EXPECT_EQ(error_of([&] { c.expect("bias", 1); }), "[config] 'bias' must be an integer but is true");
    c.expect("bias", true);
    c.expect("absent", 4);
    EXPECT_EQ(error_of([&] { c.reject("n_groups", "is odd"); }), "[config] 'n_groups' = 3 is odd");
    EXPECT_EQ(error_of([&] { c.reject("absent", "is needed"); }), "[config] 'absent' is needed");
}

TEST(ConfigReader, NestedObjects) {
    const auto c =
        read(R"({"ssm_cfg": {"layer": "Mamba2", "d_state": 0, "deep": {"x": 1, "y": 2}}, "other": 1})");
    const auto ssm = c.object("ssm_cfg");
    EXPECT_EQ(ssm.get<std::string>("layer"), "Mamba2");
    EXPECT_EQ(error_of([&] { ssm.get<int>("d_state", at_least(1)); }),
              "[config] 'ssm_cfg.d_state' = 0 must be >= 1");
    EXPECT_EQ(error_of([&] { ssm.get<int>("none"); }), "[config] 'ssm_cfg.none' is missing");
    EXPECT_EQ(error_of([&] { c.object("other"); }), "[config] 'other' must be an object but is 1");
    EXPECT_EQ(error_of([&] { c.finish(); }), "[config] not supported: 'ssm_cfg.deep'");
    EXPECT_EQ(ssm.object("deep").get<int>("x"), 1);
    EXPECT_EQ(error_of([&] { c.finish(); }), "[config] not supported: 'ssm_cfg.deep.y'");
    ssm.object("deep").ignore({"y"});
    c.finish();
    EXPECT_FALSE(c.object("absent").has("x"));
}

TEST(ConfigReader, FinishNamesWhatIsLeft) {
    const auto c = read(R"({"known": 1, "b_left": 2, "a_left": false, "empty": null, "_name_or_path": "x",
                            "torch_dtype": "float32", "is_decoder": false, "bos_token_id": 0})");
    EXPECT_EQ(c.get<int>("known"), 1);
    EXPECT_EQ(error_of([&] { c.finish(); }), "[config] not supported: 'a_left', 'b_left'");
    c.ignore({"a_left", "b_left"});
    c.finish();
    EXPECT_EQ(error_of([] { read(R"({"is_decoder": true})").finish(); }),
              "[config] not supported: 'is_decoder'");
    EXPECT_EQ(error_of([] { read(R"({"o": {"dtype": 1}})").finish(); }), "[config] not supported: 'o'");
    std::string many = "{";
    for (int i = 0; i < 10; ++i) many += fmt::format("{}\"k{}\": 1", i ? "," : "", i);
    EXPECT_EQ(error_of([&] { read(many + "}").finish(); }),
              "[config] not supported: 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7' and 2 more");
}

TEST(ConfigReader, BadText) {
    EXPECT_EQ(error_of([] { read("[]"); }), "[config] the file does not hold an object");
    EXPECT_EQ(error_of([] { read("{"); }).substr(0, 36), "[config] not valid JSON at byte 1: s");
    EXPECT_EQ(error_of([] { ConfigReader::parse("[", "generation_config"); }).substr(0, 27),
              "[generation_config] not val");
    const test::TempFolder folder;
    EXPECT_EQ(error_of([&] { ConfigReader::open(folder / "config.json"); }),
              "[file] " + (folder / "config.json").string() + ": does not exist");
}

TEST(ConfigReader, ReadsTheFixtures) {
    const auto shared = test::shared_dir();
    if (shared.empty()) GTEST_SKIP() << "no shared folder";
    const auto c = ConfigReader::open(shared / "fixtures/models/mamba2/config.json");
    EXPECT_EQ(c.get<std::vector<double>>("time_step_limit"), (std::vector<double>{0.0, INFINITY}));
    EXPECT_EQ(c.get<int64_t>("n_groups", kDimension), 2);
    EXPECT_EQ(c.choice("model_type", {"mamba2"}), "mamba2");
    EXPECT_NE(error_of([&] { c.finish(); }), "(no error)");
    const auto original = ConfigReader::open(shared / "fixtures/models/mamba_ssm_mamba2/config.json");
    EXPECT_EQ(original.object("ssm_cfg").get<int64_t>("d_state"), 32);
    EXPECT_EQ(original.get<int64_t>({"hidden_size", "d_model"}), 64);
}

}  // namespace
}  // namespace ssm
