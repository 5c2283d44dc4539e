// What a run is measured by while it trains, on data that it does not train on.
#pragma once

#include <cstdint>
#include <optional>

namespace ssm {

struct Validation {
    double loss = 0;                      // nats per predicted token
    std::optional<double> bits_per_byte;  // of a text: loss / ln 2 * tokens / bytes
    std::optional<double> accuracy;       // of a task: share of the answers that are right, [0, 1]
    int64_t tokens = 0;                   // predicted
};

class Validator {
public:
    virtual ~Validator() = default;
    // With the weights as they are now.
    virtual Validation validate() = 0;
};

}  // namespace ssm
