#include "ssm/io/tokenizer/added_tokens.h"

#include <algorithm>

#include "ssm/core/error.h"

namespace ssm::tokenizer {

namespace {

constexpr size_t kMaxContent = 1024;  // bytes; a search may look at so many from every start

[[noreturn]] void bad(std::string_view message) { fail(ErrorCode::bad_file, "tokenizer", "{}", message); }

// The character that ends before `end`.
Character character_before(std::string_view text, size_t end) {
    size_t begin = end - 1;
    while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    return character_at(text, begin);
}

AddedToken read_token(const nlohmann::json& object, int64_t max_id) {
    AddedToken token;
    token.content = string_field(object, "content", "an added token");
    const std::string what = "added token " + shown(token.content);
    token.id = static_cast<int32_t>(integer_field(object, "id", 0, max_id - 1, what));
    token.single_word = bool_field(object, "single_word", false, what);
    token.left_strip = bool_field(object, "lstrip", false, what);
    token.right_strip = bool_field(object, "rstrip", false, what);
    token.special = bool_field(object, "special", false, what);
    token.normalized = bool_field(object, "normalized", !token.special, what);
    if (token.content.empty()) bad(fmt::format("the added token of id {} is empty", token.id));
    if (token.content.size() > kMaxContent) bad(fmt::format("{} is longer than {} bytes", what, kMaxContent));
    return token;
}

}  // namespace

int32_t StringSet::child_of(int32_t node, char byte) const {
    if (node == 0) return root_[static_cast<uint8_t>(byte)];
    int32_t child = nodes_[static_cast<size_t>(node)].child;
    while (child >= 0 && nodes_[static_cast<size_t>(child)].byte != byte)
        child = nodes_[static_cast<size_t>(child)].sibling;
    return child;
}

bool StringSet::insert(std::string_view text, int32_t value) {
    int32_t node = 0;
    for (const char byte : text) {
        int32_t child = child_of(node, byte);
        if (child < 0) {
            child = static_cast<int32_t>(nodes_.size());
            auto& first =
                node == 0 ? root_[static_cast<uint8_t>(byte)] : nodes_[static_cast<size_t>(node)].child;
            const int32_t sibling = first;
            first = child;
            nodes_.push_back({-1, -1, sibling, byte});
        }
        node = child;
    }
    auto& slot = nodes_[static_cast<size_t>(node)].value;
    if (slot >= 0) return false;
    slot = value;
    return true;
}

int32_t StringSet::longest(std::string_view text, size_t at, size_t& length) const {
    int32_t node = 0, value = -1;
    for (size_t i = at; i < text.size(); ++i) {
        node = child_of(node, text[i]);
        if (node < 0) break;
        if (nodes_[static_cast<size_t>(node)].value >= 0) {
            value = nodes_[static_cast<size_t>(node)].value;
            length = i + 1 - at;
        }
    }
    return value;
}

AddedTokens::AddedTokens(const Document& document, const BpeModel& model, const Normalizer& normalizer) {
    size_ = model.size();
    const auto& list = field(document.rest, "added_tokens");
    if (list.is_null()) return;
    if (!list.is_array()) bad("added_tokens is not a list");
    RegexScratch scratch;
    for (const auto& object : list) {
        AddedToken token = read_token(object, document.max_id);
        token.normalized_content =
            token.normalized ? normalizer.apply(token.content, scratch) : token.content;
        add(std::move(token), model);
    }
}

void AddedTokens::add(AddedToken token, const BpeModel& model) {
    const std::string what = "added token " + shown(token.content);
    const int32_t known = model.find(token.content);
    if (known >= 0 && known != token.id)
        bad(fmt::format("{} has id {} but model.vocab gives it {}", what, token.id, known));
    if (known < 0 && model.has(token.id))
        bad(fmt::format("{} has the id {} of {}", what, token.id, shown(model.token(token.id))));
    if (!by_id_.emplace(token.id, tokens_.size()).second)
        bad(fmt::format("{} has the id {} of another added token", what, token.id));
    if (!by_content_.emplace(token.content, tokens_.size()).second) bad(what + " appears twice");
    if (!token.normalized_content.empty() &&
        !(token.normalized ? normalized_ : raw_)
             .insert(token.normalized_content, static_cast<int32_t>(tokens_.size())))
        bad(what + " equals another one after normalization");
    size_ = std::max(size_, token.id + 1);
    tokens_.push_back(std::move(token));
}

const AddedToken* AddedTokens::find(int32_t id) const {
    const auto found = by_id_.find(id);
    return found == by_id_.end() ? nullptr : &tokens_[found->second];
}

const AddedToken* AddedTokens::find(std::string_view content) const {
    const auto found = by_content_.find(std::string(content));
    return found == by_content_.end() ? nullptr : &tokens_[found->second];
}

bool AddedTokens::widen(const AddedToken& token, std::string_view text, size_t done, size_t& begin,
                        size_t& end) {
    if (token.single_word) {
        if (begin > 0 && is_word(character_before(text, begin).code)) return false;
        if (end < text.size() && is_word(character_at(text, end).code)) return false;
    }
    while (token.left_strip && begin > done) {
        const Character c = character_before(text, begin);
        if (!is_space(c.code)) break;
        begin -= c.length;
    }
    while (token.right_strip && end < text.size()) {
        const Character c = character_at(text, end);
        if (!is_space(c.code)) break;
        end += c.length;
    }
    return true;
}

}  // namespace ssm::tokenizer
