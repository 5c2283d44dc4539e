#include "ssm/io/json/json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/support/temp_folder.h"

namespace ssm {
namespace {

using nlohmann::json;
using test::error_of;

std::string parse_error(std::string_view text, const JsonOptions& options = {}) {
    return error_of([&] { parse_json(text, "t", options); });
}

TEST(ParseJson, AgreesWithTheLibrary) {
    const std::string text = R"( {"a": [1, -2, 3.5, 1e3, true, false, null, [], {}, [[1], {"x": "y"}]],
        "b": {"c": {"d": "e\u00e9\"\\\n"}, "": 18446744073709551615}, "Infinity": "NaN -Infinity [{"} )";
    EXPECT_EQ(parse_json(text, "t"), json::parse(text));
    EXPECT_EQ(parse_json("7", "t"), json(7));
    EXPECT_EQ(parse_json("\"x\"", "t"), json("x"));
}

TEST(ParseJson, SpecialFloatsInBothSpellings) {
    const json v = parse_json(R"([NaN, Infinity, -Infinity, {"__float__": "NaN"}, {"__float__": "Infinity"},
                                 {"__float__": "-Infinity"}, {"__float__": "other"}, {"a":-Infinity,"b":2}])",
                              "t");
    ASSERT_EQ(v.size(), 8u);
    for (const size_t i : {0u, 3u}) EXPECT_TRUE(std::isnan(v[i].get<double>()));
    for (const size_t i : {1u, 4u}) EXPECT_EQ(v[i].get<double>(), INFINITY);
    for (const size_t i : {2u, 5u}) EXPECT_EQ(v[i].get<double>(), -INFINITY);
    EXPECT_TRUE(v[6].is_object());
    EXPECT_EQ(v[7]["a"].get<double>(), -INFINITY);
    EXPECT_EQ(v[7]["b"], 2);
    EXPECT_EQ(parse_json("Infinity", "t").get<double>(), INFINITY);
}

TEST(ParseJson, Errors) {
    EXPECT_EQ(parse_error(""),
              "[t] not valid JSON at byte 0: syntax error while parsing value - unexpected end of input; "
              "expected '[', '{', or a literal");
    EXPECT_EQ(parse_error("{\"a\": x}"),
              "[t] not valid JSON at byte 6: syntax error while parsing value - invalid literal; last read: "
              "'\"a\": x'");
    EXPECT_EQ(parse_error("[1 2]", {.name = "f.json"}),
              "[t] f.json: not valid JSON at byte 3: syntax error while parsing array - unexpected number "
              "literal; expected ']'");
    EXPECT_EQ(parse_error("{\"a\": 1, \"b\": {\"a\": 2, \"a\": 3}}"), "[t] key 'a' appears twice");
    EXPECT_EQ(parse_error("[1e999]"), "[t] not valid JSON at byte 5: number overflow parsing '1e999'");
    EXPECT_EQ(
        parse_error("[1] 2", {.name = "f"}),
        "[t] f: not valid JSON at byte 4: syntax error while parsing value - unexpected number literal; "
        "expected end of input");
    EXPECT_EQ(parse_error("123456", {.max_bytes = 5}), "[t] 6 bytes of JSON; at most 5 are read");
    EXPECT_EQ(
        parse_error("\xff"),
        "[t] not valid JSON at byte 0: syntax error while parsing value - invalid literal; last read: '?'");
    EXPECT_NE(parse_error("{Infinity: 1}"), "(no error)");
    EXPECT_NE(parse_error("[Infinit]"), "(no error)");
}

TEST(ParseJson, OffsetsCountInTheOriginal) {
    EXPECT_EQ(parse_error("[NaN, -Infinity, Infinity, x]").substr(0, 32), "[t] not valid JSON at byte 27: s");
}

TEST(ParseJson, DepthIsLimited) {
    EXPECT_EQ(parse_json(std::string(64, '[') + std::string(64, ']'), "t").size(), 1u);
    EXPECT_EQ(parse_error(std::string(65, '[') + std::string(65, ']')),
              "[t] not valid JSON at byte 64: nested deeper than 64 levels");
    std::string bomb;
    for (int i = 0; i < 1'000'000; ++i) bomb += "{\"a\":";
    EXPECT_EQ(parse_error(bomb), "[t] not valid JSON at byte 320: nested deeper than 64 levels");
    EXPECT_EQ(parse_json("[[]]", "t", {.max_depth = 2}).size(), 1u);
    EXPECT_EQ(parse_error("[[]]", {.max_depth = 1}),
              "[t] not valid JSON at byte 1: nested deeper than 1 levels");
    EXPECT_EQ(parse_json(R"(["\"[[[[[[", "]"])", "t", {.max_depth = 1}).size(), 2u) << "brackets in strings";
}

TEST(ParseJson, MessagesStayShortAndClean) {
    const std::string error = parse_error("\"" + std::string(100'000, 'x') + "\n");
    EXPECT_LT(error.size(), 300u);
    EXPECT_EQ(error.find('\n'), std::string::npos);
    EXPECT_LT(
        parse_error("{\"" + std::string(5000, 'k') + "\":1,\"" + std::string(5000, 'k') + "\":1}").size(),
        200u);
}

}  // namespace
}  // namespace ssm
