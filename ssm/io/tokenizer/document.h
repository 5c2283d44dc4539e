// The content of a tokenizer.json: its two large tables apart, the rest as a JSON value.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ssm::tokenizer {

struct Document {
    nlohmann::json rest;  // everything but model.vocab and model.merges
    std::vector<std::pair<std::string, int64_t>> vocab;
    std::vector<std::pair<std::string, std::string>> merges;  // by rank
    bool has_vocab = false, has_merges = false;
    int64_t max_id = 0;  // exclusive; what the size of the file justifies
};

// One pass over the text without building a tree for the tables. Depth is limited to 64.
Document read_document(std::string_view json);

// Typed access to small objects; `what` names the object in messages.
std::string string_field(const nlohmann::json& object, const char* key, std::string_view what);
bool bool_field(const nlohmann::json& object, const char* key, bool otherwise, std::string_view what);
int64_t integer_field(const nlohmann::json& object, const char* key, int64_t low, int64_t high,
                      std::string_view what);
// The member `key`, or null.
const nlohmann::json& field(const nlohmann::json& object, const char* key);

// One element of a normalizer, pre_tokenizer, post_processor or decoder; sequences are flattened. Null gives
// none. `list_key` is the name of the member that holds the elements of a Sequence.
std::vector<const nlohmann::json*> steps_of(const nlohmann::json& object, const char* list_key,
                                            std::string_view what);

}  // namespace ssm::tokenizer
