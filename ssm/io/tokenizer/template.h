// The post_processor of a tokenizer.json, for one sequence: ids before it and after it.
#pragma once

#include <cstdint>
#include <vector>

#include "ssm/io/tokenizer/document.h"

namespace ssm::tokenizer {

class Template {
public:
    // ids must be below `size`.
    Template(const Document& document, int32_t size);
    const std::vector<int32_t>& prefix() const { return prefix_; }
    const std::vector<int32_t>& suffix() const { return suffix_; }

private:
    void read(const nlohmann::json& step);
    void read_template(const nlohmann::json& step);
    int32_t pair_id(const nlohmann::json& step, const char* key) const;
    void wrap(std::vector<int32_t> before, const std::vector<int32_t>& after);

    int32_t size_;
    std::vector<int32_t> prefix_, suffix_;
};

}  // namespace ssm::tokenizer
