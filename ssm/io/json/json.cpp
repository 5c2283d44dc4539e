#include "ssm/io/json/json.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "ssm/core/error.h"
#include "ssm/io/printable.h"

namespace ssm {
namespace {

using nlohmann::json;

constexpr std::string_view kSpecialFloats[] = {"-Infinity", "Infinity", "NaN"};

double special_float(std::string_view token) {
    if (token == "NaN") return std::numeric_limits<double>::quiet_NaN();
    return token[0] == '-' ? -HUGE_VAL : HUGE_VAL;
}

// The text with bare Infinity and NaN written as objects, and how to find the way back to its bytes.
class Prepared {
public:
    Prepared(std::string_view text, std::string_view where, const JsonOptions& options) : text_(text) {
        size_t depth = 0, copied = 0;
        bool in_string = false;
        for (size_t i = 0; i < text.size(); ++i) {
            const char c = text[i];
            if (in_string) {
                if (c == '\\') ++i;
                in_string = c != '"';
            } else if (c == '"') {
                in_string = true;
            } else if (c == '[' || c == '{') {
                if (++depth > options.max_depth) {
                    fail(ErrorCode::bad_file, where, "{}",
                         json_error_line(options, i,
                                         fmt::format("nested deeper than {} levels", options.max_depth)));
                }
            } else if ((c == ']' || c == '}') && depth > 0) {
                --depth;
            } else if (c == '-' || c == 'I' || c == 'N') {
                i += replace(i, copied);
            }
        }
        if (copied > 0) rewritten_.append(text.substr(copied));
    }

    std::string_view text() const { return shifts_.empty() ? text_ : std::string_view(rewritten_); }

    // Where byte `at` of text() stands in the original.
    size_t original(size_t at) const {
        size_t shift = 0;
        for (const auto& [from, by] : shifts_) {
            if (at >= from) shift = by;
        }
        return at > shift ? at - shift : 0;
    }

private:
    // Replaces a special float at `i`; returns how many bytes to skip beyond it.
    size_t replace(size_t i, size_t& copied) {
        for (const std::string_view token : kSpecialFloats) {
            if (text_.substr(i, token.size()) != token) continue;
            const std::string object = fmt::format(R"({{"__float__":"{}"}})", token);
            rewritten_.append(text_.substr(copied, i - copied)).append(object);
            copied = i + token.size();
            shifts_.emplace_back(rewritten_.size(), rewritten_.size() - copied);
            return token.size() - 1;
        }
        return 0;
    }

    std::string_view text_;
    std::string rewritten_;
    std::vector<std::pair<size_t, size_t>> shifts_;  // from this byte of rewritten_ on, shifted by so many
};

// Builds the value from nlohmann's events; refuses duplicate keys.
class Builder {
public:
    Builder(const Prepared& text, std::string_view where, const JsonOptions& options)
        : text_(text), where_(where), options_(options) {}

    bool null() { return put(nullptr); }
    bool boolean(bool v) { return put(v); }
    bool number_integer(int64_t v) { return put(v); }
    bool number_unsigned(uint64_t v) { return put(v); }
    bool number_float(double v, const std::string&) { return put(v); }
    bool string(std::string& v) { return put(std::move(v)); }
    bool binary(json::binary_t&) { return false; }  // never sent for JSON text
    bool start_object(size_t) { return open(json::object()); }
    bool start_array(size_t) { return open(json::array()); }
    bool key(std::string& name) {
        const auto [at, is_new] = open_.back()->get_ref<json::object_t&>().emplace(name, nullptr);
        if (!is_new) fail_line(fmt::format("key '{}' appears twice", printable(name)));
        slot_ = &at->second;
        return true;
    }
    bool end_object() {
        json& object = *open_.back();
        const auto special = object.size() == 1 ? object.find("__float__") : object.end();
        if (special != object.end() && special->is_string()) {
            for (const std::string_view token : kSpecialFloats) {
                if (special->get_ref<const std::string&>() != token) continue;
                object = special_float(token);
                break;
            }
        }
        open_.pop_back();
        return true;
    }
    bool end_array() {
        open_.pop_back();
        return true;
    }
    bool parse_error(size_t position, const std::string&, const json::exception& error) {
        const size_t byte = position > 0 ? position - 1 : 0;
        fail(ErrorCode::bad_file, where_, "{}",
             json_error_line(options_, text_.original(byte), error.what()));
    }

    json take() { return std::move(root_); }

private:
    [[noreturn]] void fail_line(std::string_view what) const {
        fail(ErrorCode::bad_file, where_, "{}{}{}", options_.name, options_.name.empty() ? "" : ": ", what);
    }

    template <class T>
    json* place(T&& value) {
        if (open_.empty()) {
            root_ = json(std::forward<T>(value));
            return &root_;
        }
        if (open_.back()->is_array()) {
            auto& array = open_.back()->get_ref<json::array_t&>();
            array.emplace_back(std::forward<T>(value));
            return &array.back();
        }
        *slot_ = json(std::forward<T>(value));
        return slot_;
    }
    template <class T>
    bool put(T&& value) {
        place(std::forward<T>(value));
        return true;
    }
    bool open(json value) {
        open_.push_back(place(std::move(value)));
        return true;
    }

    const Prepared& text_;
    std::string_view where_;
    const JsonOptions& options_;
    json root_;
    std::vector<json*> open_;  // the containers around the current position, outermost first
    json* slot_ = nullptr;     // of the last key
};

}  // namespace

std::string json_error_line(const JsonOptions& options, size_t byte, std::string_view complaint) {
    // nlohmann: "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ..."
    if (complaint.starts_with("[json.")) complaint.remove_prefix(complaint.find(' ') + 1);
    if (complaint.starts_with("parse error at")) complaint.remove_prefix(complaint.find(": ") + 2);
    std::string line = printable(complaint, 160);
    for (char& c : line) {
        if (static_cast<unsigned char>(c) >= 0x80) c = '?';  // what it read may not be UTF-8
    }
    return fmt::format("{}{}not valid JSON at byte {}: {}", options.name, options.name.empty() ? "" : ": ",
                       byte, line);
}

nlohmann::json parse_json(std::string_view text, std::string_view where, const JsonOptions& options) {
    if (text.size() > options.max_bytes) {
        fail(ErrorCode::bad_file, where, "{}{}{} bytes of JSON; at most {} are read", options.name,
             options.name.empty() ? "" : ": ", text.size(), options.max_bytes);
    }
    const Prepared prepared(text, where, options);
    Builder builder(prepared, where, options);
    const std::string_view input = prepared.text();
    json::sax_parse(input.data(), input.data() + input.size(), &builder);
    return builder.take();
}

}  // namespace ssm
