// config.json, read key by key: typed, with ranges, and nothing left over. A key that nobody read may change
// the maths, so finish() refuses it; keys that never do are in a table in config_reader.cpp.
//
//   const ConfigReader config = ConfigReader::open(folder / "config.json");
//   const auto e = config.get<int64_t>({"hidden_size", "d_model"}, kDimension);
//   const auto groups = config.get_or<int64_t>("n_groups", 1, kDimension);
//   config.expect("residual_in_fp32", true);
//   config.finish();
//
// A key with the value null counts as absent. Infinity is read in both spellings (json.h). Copies of a reader
// share which keys were read; so do the readers of nested objects, which the root's finish() checks too.
// Errors (bad_file; unsupported where this build lacks it), one line:
//   [config] 'hidden_size' is missing
//   [config] 'hidden_size' must be an integer but is "abc"
//   [config] 'ssm_cfg.d_state' = 0 must be >= 1
//   [config] not supported: 'n_groups_2', 'logits_scaling'
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ssm/core/error.h"

namespace ssm {

// What a number may be, bounds included.
struct Range {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();
};
constexpr Range at_least(double low) { return {.low = low}; }
constexpr Range between(double low, double high) { return {low, high}; }
// A size: products of two of them do not overflow int64.
inline constexpr Range kDimension{1, 2147483647};

// One key, or several that mean the same: the first that is present counts, and two that are present must
// agree.
class Keys {
public:
    Keys(const char* key) : names_{key} {}         // NOLINT(google-explicit-constructor)
    Keys(std::string_view key) : names_{key} {}    // NOLINT(google-explicit-constructor)
    Keys(const std::string& key) : names_{key} {}  // NOLINT(google-explicit-constructor)
    Keys(std::initializer_list<std::string_view> keys) : names_(keys) {}
    const std::vector<std::string_view>& names() const { return names_; }

private:
    std::vector<std::string_view> names_;  // borrowed: a Keys does not outlive the call
};

class ConfigReader {
public:
    // `where` heads the messages.
    static ConfigReader open(const std::filesystem::path& file, std::string where = "config");
    static ConfigReader parse(std::string_view text, std::string where = "config");

    // Present and not null. Does not count as read.
    bool has(const Keys& keys) const;
    // Whether get<T>() would find the right type: "dt_rank" may be "auto" or a number. Does not count as
    // read.
    template <class T>
    bool holds(const Keys& keys) const;

    // T: bool, int, int64_t, float, double, std::string, and std::vector of int64_t, double, std::string.
    // The range applies to numbers, also those of a list.
    template <class T>
    T get(const Keys& keys, Range range = {}) const;
    template <class T>
    T get_or(const Keys& keys, T fallback, Range range = {}) const {
        return has(keys) ? get<T>(keys, range) : (mark(keys), std::move(fallback));
    }
    // A string that must be one of a few (unsupported otherwise).
    std::string choice(const Keys& keys, std::initializer_list<std::string_view> allowed) const;
    std::string choice_or(const Keys& keys, std::string_view fallback,
                          std::initializer_list<std::string_view> allowed) const;
    // For a key of which only one value is supported: it must be absent or have that value.
    template <class T>
    void expect(const Keys& keys, const T& only) const {
        if (!has(keys)) return mark(keys);
        if (get<T>(keys) != only) reject(keys, fmt::format("is not supported, only {}", only));
    }
    void expect(const Keys& keys, const char* only) const { expect(keys, std::string(only)); }
    // A nested object; an empty one when absent.
    ConfigReader object(const Keys& keys) const;
    // Declares keys that this model may have and that do not change what it computes.
    void ignore(std::initializer_list<std::string_view> keys) const;

    // Throws (unsupported) "[config] 'key' = value WHAT".
    [[noreturn]] void reject(const Keys& keys, std::string_view what) const;
    // Throws (bad_file) "[config] 'a' = 3 does not divide 'b' = 8" unless it does.
    void require_divides(std::string_view a, int64_t a_value, std::string_view b, int64_t b_value) const;
    // Throws (unsupported) naming the keys, here and in nested objects, that are neither read nor harmless.
    // Call it on the root.
    void finish() const;

    const std::string& where() const;

private:
    struct State;
    ConfigReader() = default;
    void mark(const Keys& keys) const;

    std::shared_ptr<State> state_;
    const void* object_ = nullptr;  // the JSON object inside state_ that this reader reads
    std::string prefix_;            // "" or "ssm_cfg."
};

}  // namespace ssm
