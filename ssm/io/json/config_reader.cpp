#include "ssm/io/json/config_reader.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <type_traits>
#include <utility>

#include <fmt/ranges.h>

#include "ssm/io/json/json.h"
#include "ssm/io/mapped_file.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

using nlohmann::json;

// Keys that Hugging Face files carry and that never change what a causal language model computes in inference
// or training by our recipe: provenance, storage type, token ids of the tokenizer, output formats, generation
// defaults (generation_config.json rules), classification heads, parallelism.
constexpr std::string_view kHarmless[] = {"_attn_implementation",
                                          "_attn_implementation_autoset",
                                          "_commit_hash",
                                          "_name_or_path",
                                          "architectures",
                                          "auto_map",
                                          "bad_words_ids",
                                          "begin_suppress_tokens",
                                          "bos_token_id",
                                          "decoder_start_token_id",
                                          "diversity_penalty",
                                          "do_sample",
                                          "dtype",
                                          "early_stopping",
                                          "encoder_no_repeat_ngram_size",
                                          "eos_token_id",
                                          "exponential_decay_length_penalty",
                                          "finetuning_task",
                                          "forced_bos_token_id",
                                          "forced_eos_token_id",
                                          "id2label",
                                          "initializer_range",
                                          "label2id",
                                          "length_penalty",
                                          "max_length",
                                          "max_new_tokens",
                                          "min_length",
                                          "model_type",
                                          "name_or_path",
                                          "no_repeat_ngram_size",
                                          "num_beam_groups",
                                          "num_beams",
                                          "num_labels",
                                          "num_logits_to_keep",
                                          "num_return_sequences",
                                          "output_attentions",
                                          "output_hidden_states",
                                          "output_scores",
                                          "pad_token_id",
                                          "prefix",
                                          "problem_type",
                                          "remove_invalid_values",
                                          "repetition_penalty",
                                          "return_dict",
                                          "return_dict_in_generate",
                                          "sep_token_id",
                                          "suppress_tokens",
                                          "task_specific_params",
                                          "temperature",
                                          "tf_legacy_loss",
                                          "tokenizer_class",
                                          "top_k",
                                          "top_p",
                                          "torch_dtype",
                                          "torchscript",
                                          "transformers_version",
                                          "typical_p",
                                          "unk_token_id",
                                          "use_bfloat16",
                                          "use_cache"};
// Harmless as long as they are false, 0 or empty: another kind of model otherwise.
constexpr std::string_view kHarmlessWhenOff[] = {"add_cross_attention", "chunk_size_feed_forward",
                                                 "is_decoder",          "is_encoder_decoder",
                                                 "pruned_heads",        "tie_encoder_decoder"};

bool is_off(const json& v) {
    return v.is_null() || v == json(false) || (v.is_number() && v == json(0)) ||
           (v.is_structured() && v.empty());
}

// A value as a message shows it.
std::string shown(const json& value) {
    if (value.is_number_float() && !std::isfinite(value.get<double>())) {
        const double x = value.get<double>();
        return std::isnan(x) ? "NaN" : x < 0 ? "-Infinity" : "Infinity";
    }
    return printable(value.dump(-1, ' ', false, json::error_handler_t::replace), 60);
}

// Equal in value; NaN equals NaN.
bool agree(const json& a, const json& b) { return a == b || shown(a) == shown(b); }

template <class T>
inline constexpr bool is_list = false;
template <class T>
inline constexpr bool is_list<std::vector<T>> = true;

template <class T>
constexpr std::string_view type_name() {
    if constexpr (std::is_same_v<T, bool>) return "true or false";
    if constexpr (std::is_integral_v<T>) return "an integer";
    if constexpr (std::is_floating_point_v<T>) return "a number";
    if constexpr (std::is_same_v<T, std::string>) return "a string";
    return "a list";
}

template <class T>
bool has_type(const json& v) {
    if constexpr (std::is_same_v<T, bool>) return v.is_boolean();
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) return v.is_number_integer();
    if constexpr (std::is_floating_point_v<T>) return v.is_number();
    if constexpr (std::is_same_v<T, std::string>) return v.is_string();
    if constexpr (is_list<T>) {
        return v.is_array() && std::all_of(v.begin(), v.end(), has_type<typename T::value_type>);
    }
}

// `path` is quoted already: "'a.b'" or "'a.b'[3]".
template <class T>
T convert(const json& v, const std::string& path, Range range, std::string_view where) {
    if constexpr (is_list<T>) {
        if (!v.is_array()) fail(ErrorCode::bad_file, where, "{} must be a list but is {}", path, shown(v));
        T list;
        for (size_t i = 0; i < v.size(); ++i) {
            list.push_back(
                convert<typename T::value_type>(v[i], fmt::format("{}[{}]", path, i), range, where));
        }
        return list;
    } else {
        if (!has_type<T>(v)) {
            fail(ErrorCode::bad_file, where, "{} must be {} but is {}", path, type_name<T>(), shown(v));
        }
        if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, std::string>) {
            return v.get<T>();
        } else {
            const auto x = v.get<double>();
            const bool unbounded = std::isinf(range.low) && std::isinf(range.high);
            if (!unbounded && !(x >= range.low && x <= range.high)) {
                const std::string rule = std::isinf(range.high)
                                             ? fmt::format(">= {}", range.low)
                                             : fmt::format("in {}..{}", range.low, range.high);
                fail(ErrorCode::bad_file, where, "{} = {} must be {}", path, shown(v), rule);
            }
            const bool fits = std::is_floating_point_v<T>
                                  ? std::isfinite(static_cast<T>(x)) || !std::isfinite(x)
                                  : x >= static_cast<double>(std::numeric_limits<T>::min()) &&
                                        x < static_cast<double>(std::numeric_limits<T>::max());
            if (!fits) fail(ErrorCode::bad_file, where, "{} = {} is too large", path, shown(v));
            return v.get<T>();
        }
    }
}

}  // namespace

struct ConfigReader::State {
    std::string where;
    json root;
    std::set<std::string, std::less<>> read, opened;  // full paths: of keys, and of objects opened as readers

    const json* find(const void* object, const Keys& keys, const std::string& prefix,
                     std::string_view* key) const {
        const json* found = nullptr;
        std::string_view first;
        for (const std::string_view name : keys.names()) {
            const json& o = *static_cast<const json*>(object);
            const auto at = o.find(name);
            if (at == o.end() || at->is_null()) continue;
            if (found == nullptr) {
                found = &*at;
                first = name;
            } else if (!agree(*found, *at)) {
                fail(ErrorCode::bad_file, where, "'{}{}' = {} contradicts '{}{}' = {}", prefix, first,
                     shown(*found), prefix, name, shown(*at));
            }
        }
        if (key != nullptr) *key = found != nullptr ? first : keys.names().front();
        return found;
    }

    void collect_left(const json& object, const std::string& prefix, std::vector<std::string>& left) const {
        for (const auto& [key, value] : object.items()) {
            const std::string path = prefix + key;
            if (opened.contains(path) && value.is_object()) {
                collect_left(value, path + ".", left);
                continue;
            }
            const auto named = [&key = key](std::string_view name) { return name == key; };
            const bool harmless =
                prefix.empty() && (std::any_of(std::begin(kHarmless), std::end(kHarmless), named) ||
                                   (is_off(value) && std::any_of(std::begin(kHarmlessWhenOff),
                                                                 std::end(kHarmlessWhenOff), named)));
            if (!value.is_null() && !harmless && !read.contains(path)) left.push_back(path);
        }
    }
};

ConfigReader ConfigReader::open(const std::filesystem::path& file, std::string where) {
    return parse(read_text_file(file, size_t{16} << 20), std::move(where));
}

ConfigReader ConfigReader::parse(std::string_view text, std::string where) {
    ConfigReader reader;
    reader.state_ = std::make_shared<State>();
    reader.state_->root = parse_json(text, where);
    if (!reader.state_->root.is_object())
        fail(ErrorCode::bad_file, where, "the file does not hold an object");
    reader.state_->where = std::move(where);
    reader.object_ = &reader.state_->root;
    return reader;
}

const std::string& ConfigReader::where() const { return state_->where; }

void ConfigReader::mark(const Keys& keys) const {
    for (const std::string_view name : keys.names()) state_->read.insert(prefix_ + std::string(name));
}

void ConfigReader::ignore(std::initializer_list<std::string_view> keys) const {
    for (const std::string_view name : keys) state_->read.insert(prefix_ + std::string(name));
}

bool ConfigReader::has(const Keys& keys) const {
    return state_->find(object_, keys, prefix_, nullptr) != nullptr;
}

template <class T>
bool ConfigReader::holds(const Keys& keys) const {
    const json* v = state_->find(object_, keys, prefix_, nullptr);
    return v != nullptr && has_type<T>(*v);
}

template <class T>
T ConfigReader::get(const Keys& keys, Range range) const {
    mark(keys);
    std::string_view key;
    const json* v = state_->find(object_, keys, prefix_, &key);
    if (v == nullptr) fail(ErrorCode::bad_file, where(), "'{}{}' is missing", prefix_, key);
    return convert<T>(*v, fmt::format("'{}{}'", prefix_, key), range, where());
}

std::string ConfigReader::choice(const Keys& keys, std::initializer_list<std::string_view> allowed) const {
    const auto value = get<std::string>(keys);
    if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
        reject(keys, fmt::format("is not supported, only {}", fmt::join(allowed, ", ")));
    }
    return value;
}

std::string ConfigReader::choice_or(const Keys& keys, std::string_view fallback,
                                    std::initializer_list<std::string_view> allowed) const {
    if (has(keys)) return choice(keys, allowed);
    mark(keys);
    return std::string(fallback);
}

ConfigReader ConfigReader::object(const Keys& keys) const {
    static const json kEmpty = json::object();
    mark(keys);
    std::string_view key;
    const json* v = state_->find(object_, keys, prefix_, &key);
    if (v != nullptr && !v->is_object()) {
        fail(ErrorCode::bad_file, where(), "'{}{}' must be an object but is {}", prefix_, key, shown(*v));
    }
    ConfigReader nested;
    nested.state_ = state_;
    nested.object_ = v != nullptr ? v : &kEmpty;
    nested.prefix_ = prefix_ + std::string(key) + ".";
    state_->opened.insert(prefix_ + std::string(key));
    return nested;
}

void ConfigReader::reject(const Keys& keys, std::string_view what) const {
    std::string_view key;
    const json* v = state_->find(object_, keys, prefix_, &key);
    fail(ErrorCode::unsupported, where(), "'{}{}'{} {}", prefix_, key,
         v != nullptr ? " = " + shown(*v) : std::string(), what);
}

void ConfigReader::require_divides(std::string_view a, int64_t a_value, std::string_view b,
                                   int64_t b_value) const {
    if (a_value != 0 && b_value % a_value == 0) return;
    fail(ErrorCode::bad_file, where(), "'{}{}' = {} does not divide '{}{}' = {}", prefix_, a, a_value,
         prefix_, b, b_value);
}

void ConfigReader::finish() const {
    constexpr size_t kNamed = 8;
    std::vector<std::string> left;
    const auto& object = *static_cast<const json*>(object_);
    state_->collect_left(object, prefix_, left);
    if (left.empty()) return;
    std::string list;
    for (size_t i = 0; i < std::min(left.size(), kNamed); ++i) {
        list += fmt::format("{}'{}'", i == 0 ? "" : ", ", printable(left[i]));
    }
    if (left.size() > kNamed) list += fmt::format(" and {} more", left.size() - kNamed);
    fail(ErrorCode::unsupported, where(), "not supported: {}", list);
}

template bool ConfigReader::holds<bool>(const Keys&) const;
template bool ConfigReader::holds<int>(const Keys&) const;
template bool ConfigReader::holds<int64_t>(const Keys&) const;
template bool ConfigReader::holds<float>(const Keys&) const;
template bool ConfigReader::holds<double>(const Keys&) const;
template bool ConfigReader::holds<std::string>(const Keys&) const;
template bool ConfigReader::holds<std::vector<int64_t>>(const Keys&) const;
template bool ConfigReader::holds<std::vector<double>>(const Keys&) const;
template bool ConfigReader::holds<std::vector<std::string>>(const Keys&) const;
template bool ConfigReader::get<bool>(const Keys&, Range) const;
template int ConfigReader::get<int>(const Keys&, Range) const;
template int64_t ConfigReader::get<int64_t>(const Keys&, Range) const;
template float ConfigReader::get<float>(const Keys&, Range) const;
template double ConfigReader::get<double>(const Keys&, Range) const;
template std::string ConfigReader::get<std::string>(const Keys&, Range) const;
template std::vector<int64_t> ConfigReader::get<std::vector<int64_t>>(const Keys&, Range) const;
template std::vector<double> ConfigReader::get<std::vector<double>>(const Keys&, Range) const;
template std::vector<std::string> ConfigReader::get<std::vector<std::string>>(const Keys&, Range) const;

}  // namespace ssm
