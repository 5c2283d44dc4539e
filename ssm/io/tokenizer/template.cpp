#include "ssm/io/tokenizer/template.h"

#include "ssm/core/error.h"
#include "ssm/io/tokenizer/unicode.h"

namespace ssm::tokenizer {

namespace {

[[noreturn]] void bad(std::string_view message) {
    fail(ErrorCode::bad_file, "tokenizer", "post_processor {}", message);
}

}  // namespace

Template::Template(const Document& document, int32_t size) : size_(size) {
    for (const auto* step : steps_of(field(document.rest, "post_processor"), "processors", "post_processor"))
        read(*step);
}

void Template::read(const nlohmann::json& step) {
    const std::string type = string_field(step, "type", "post_processor");
    if (type == "ByteLevel") return;  // only trims offsets
    if (type == "TemplateProcessing") return read_template(step);
    if (type == "BertProcessing" || type == "RobertaProcessing")
        return wrap({pair_id(step, "cls")}, {pair_id(step, "sep")});
    fail(ErrorCode::unsupported, "tokenizer", "post_processor {} is not supported", shown(type));
}

// ["</s>", 2]
int32_t Template::pair_id(const nlohmann::json& step, const char* key) const {
    const auto& pair = field(step, key);
    if (!pair.is_array() || pair.size() != 2 || !pair[1].is_number_integer())
        bad(fmt::format("'{}' is not a token and its id", key));
    const auto id = pair[1].get<int64_t>();
    if (id < 0 || id >= size_) bad(fmt::format("id {} of '{}' is not in [0, {})", id, key, size_));
    return static_cast<int32_t>(id);
}

void Template::read_template(const nlohmann::json& step) {
    const auto& single = field(step, "single");
    if (!single.is_array()) bad("TemplateProcessing has no list 'single'");
    std::vector<int32_t> before, after;
    bool seen = false;
    for (const auto& piece : single) {
        if (const auto& sequence = field(piece, "Sequence"); !sequence.is_null()) {
            if (seen || string_field(sequence, "id", "a Sequence") != "A")
                fail(ErrorCode::unsupported, "tokenizer",
                     "a template that does not hold sequence A exactly once is not supported");
            seen = true;
            continue;
        }
        const std::string name = string_field(field(piece, "SpecialToken"), "id", "a piece of the template");
        const auto& ids = field(field(field(step, "special_tokens"), name.c_str()), "ids");
        if (!ids.is_array()) bad(fmt::format("has no ids for {}", shown(name)));
        for (const auto& id : ids) {
            if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= size_)
                bad(fmt::format("ids of {} are not integers in [0, {})", shown(name), size_));
            (seen ? after : before).push_back(id.get<int32_t>());
        }
    }
    if (!seen)
        fail(ErrorCode::unsupported, "tokenizer",
             "a template that does not hold sequence A exactly once is not supported");
    wrap(std::move(before), after);
}

void Template::wrap(std::vector<int32_t> before, const std::vector<int32_t>& after) {
    before.insert(before.end(), prefix_.begin(), prefix_.end());
    prefix_ = std::move(before);
    suffix_.insert(suffix_.end(), after.begin(), after.end());
}

}  // namespace ssm::tokenizer
