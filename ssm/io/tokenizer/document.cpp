#include "ssm/io/tokenizer/document.h"

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxSize = size_t{1} << 30;
constexpr size_t kMaxSteps = 64;

[[noreturn]] void bad(std::string_view message) { fail(ErrorCode::bad_file, "tokenizer", "{}", message); }

// The events of nlohmann's parser. `where_` is the table being read, if any.
class Reader final : public nlohmann::json_sax<json> {
public:
    explicit Reader(Document& document) : document_(document) {}

    bool null() override { return value(nullptr); }
    bool boolean(bool v) override { return value(v); }
    bool number_float(double v, const std::string&) override { return value(v); }
    bool binary(binary_t&) override { return false; }

    bool number_integer(int64_t v) override {
        if (where_ == Where::vocab) vocab_entry(v);
        return where_ == Where::vocab || value(v);
    }

    bool number_unsigned(uint64_t v) override {
        if (v > static_cast<uint64_t>(INT64_MAX)) return value(static_cast<double>(v));
        return number_integer(static_cast<int64_t>(v));
    }

    bool string(std::string& v) override {
        if (where_ == Where::merges)
            legacy_merge(v);
        else if (where_ == Where::pair)
            pair_half(v);
        else
            return value(std::move(v));
        return true;
    }

    bool start_object(size_t) override {
        if (at_table("vocab")) return enter(Where::vocab, document_.has_vocab);
        return open(json::object());
    }

    bool start_array(size_t) override {
        if (where_ == Where::merges) {
            document_.merges.emplace_back();
            halves_ = 0;
            where_ = Where::pair;
            return true;
        }
        if (at_table("merges")) return enter(Where::merges, document_.has_merges);
        return open(json::array());
    }

    bool key(std::string& v) override {
        key_ = std::move(v);
        return true;
    }

    bool end_object() override {
        if (where_ == Where::vocab)
            where_ = Where::rest;
        else
            close();
        return true;
    }

    bool end_array() override {
        if (where_ == Where::pair) {
            if (halves_ != 2) bad(fmt::format("merge {} is not a pair", document_.merges.size() - 1));
            where_ = Where::merges;
        } else if (where_ == Where::merges) {
            where_ = Where::rest;
        } else {
            close();
        }
        return true;
    }

    bool parse_error(size_t position, const std::string&, const json::exception& e) override {
        // "[json.exception.parse_error.101] parse error at line 1, column 2: <reason>"
        std::string_view reason = e.what();
        const size_t colon = reason.find(": ");
        if (colon != std::string_view::npos) reason.remove_prefix(colon + 2);
        bad(fmt::format("not JSON at byte {}: {}", position, shown(reason)));
    }

private:
    enum class Where { rest, vocab, merges, pair };

    bool at_table(std::string_view name) const {
        return where_ == Where::rest && in_model_ && stack_.size() == 2 && key_ == name;
    }

    bool enter(Where table, bool& seen) {
        if (seen) bad(fmt::format("model.{} appears twice", key_));
        seen = true;
        where_ = table;
        return true;
    }

    void vocab_entry(int64_t id) {
        if (id < 0 || id >= document_.max_id)
            bad(fmt::format("id {} of token {} is out of range", id, shown(key_)));
        document_.vocab.emplace_back(std::move(key_), id);
    }

    // "a b"
    void legacy_merge(std::string_view v) {
        if (v.starts_with("#version")) return;
        const size_t space = v.find(' ');
        if (space == std::string_view::npos || v.find(' ', space + 1) != std::string_view::npos)
            bad(fmt::format("merge {} {} is not two tokens", document_.merges.size(), shown(v)));
        document_.merges.emplace_back(v.substr(0, space), v.substr(space + 1));
    }

    void pair_half(std::string& v) {
        if (++halves_ > 2) bad(fmt::format("merge {} is not a pair", document_.merges.size() - 1));
        auto& merge = document_.merges.back();
        (halves_ == 1 ? merge.first : merge.second) = std::move(v);
    }

    json* put(json v) {
        if (stack_.empty()) {
            document_.rest = std::move(v);
            return &document_.rest;
        }
        json& top = *stack_.back();
        if (top.is_array()) {
            top.push_back(std::move(v));
            return &top.back();
        }
        json& slot = top[key_];
        slot = std::move(v);
        return &slot;
    }

    bool value(json v) {
        if (where_ == Where::vocab) bad(fmt::format("the id of token {} is not an integer", shown(key_)));
        if (where_ != Where::rest) bad(fmt::format("merge {} is not text", document_.merges.size()));
        put(std::move(v));
        return true;
    }

    bool open(json v) {
        if (where_ == Where::vocab) bad(fmt::format("the id of token {} is not an integer", shown(key_)));
        if (where_ != Where::rest) bad(fmt::format("merge {} is not text", document_.merges.size()));
        if (stack_.size() >= kMaxDepth) bad(fmt::format("nested deeper than {}", kMaxDepth));
        if (stack_.size() == 1 && key_ == "model" && v.is_object()) in_model_ = true;
        stack_.push_back(put(std::move(v)));
        return true;
    }

    void close() {
        stack_.pop_back();
        if (stack_.size() == 1) in_model_ = false;
    }

    Document& document_;
    std::vector<json*> stack_;
    std::string key_;
    Where where_ = Where::rest;
    bool in_model_ = false;
    int halves_ = 0;
};

void collect(const json& object, const char* list_key, std::string_view what, std::vector<const json*>& out) {
    if (object.is_null()) return;
    if (string_field(object, "type", what) != "Sequence") {
        if (out.size() == kMaxSteps) bad(fmt::format("{} has more than {} steps", what, kMaxSteps));
        out.push_back(&object);
        return;
    }
    const json& list = field(object, list_key);
    if (!list.is_array()) bad(fmt::format("{} Sequence has no list '{}'", what, list_key));
    for (const json& element : list) collect(element, list_key, what, out);
}

}  // namespace

Document read_document(std::string_view text) {
    if (text.size() > kMaxSize) bad(fmt::format("a file of {} bytes is too large", text.size()));
    Document document;
    document.max_id = 65536 + static_cast<int64_t>(text.size() / 4);
    Reader reader(document);
    json::sax_parse(text.begin(), text.end(), &reader);
    if (!document.rest.is_object()) bad("the top level is not an object");
    return document;
}

const json& field(const json& object, const char* key) {
    static const json null;
    if (!object.is_object()) return null;
    const auto found = object.find(key);
    return found == object.end() ? null : *found;
}

std::string string_field(const json& object, const char* key, std::string_view what) {
    const json& v = field(object, key);
    if (!v.is_string()) bad(fmt::format("{} has no text '{}'", what, key));
    return v.get<std::string>();
}

bool bool_field(const json& object, const char* key, bool otherwise, std::string_view what) {
    const json& v = field(object, key);
    if (v.is_null()) return otherwise;
    if (!v.is_boolean()) bad(fmt::format("'{}' of {} is neither true nor false", key, what));
    return v.get<bool>();
}

int64_t integer_field(const json& object, const char* key, int64_t low, int64_t high, std::string_view what) {
    const json& v = field(object, key);
    if (!v.is_number_integer()) bad(fmt::format("{} has no integer '{}'", what, key));
    const auto number = v.get<int64_t>();
    if (number < low || number > high) bad(fmt::format("'{}' = {} of {} is out of range", key, number, what));
    return number;
}

std::vector<const json*> steps_of(const json& object, const char* list_key, std::string_view what) {
    std::vector<const json*> steps;
    collect(object, list_key, what, steps);
    return steps;
}

}  // namespace ssm::tokenizer
