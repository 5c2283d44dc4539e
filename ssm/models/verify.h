// Comparing a checkpoint with the expectation beside it (DESIGN.md): logits, loss, every gradient, greedy
// ids.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "ssm/models/language_model.h"

namespace ssm {

struct VerifyOptions {
    DType dtype = DType::f32;
    // Relative L2 error. Gradients and the loss are compared in f32 only.
    double logits_tolerance = 1e-4, gradient_tolerance = 1e-3;
};

struct Verified {
    struct Quantity {
        std::string name;
        double error = 0, tolerance = 0;
        bool ok() const { return error <= tolerance; }
    };
    std::vector<Quantity> quantities;  // greedy: the number of ids that differ
    bool ok() const;
};

// `dir` holds the model and expected.safetensors. Throws Error(bad_file) when the expectation does not fit
// the model.
Verified verify_model(const Exec& ex, const std::filesystem::path& dir, const VerifyOptions& options);

// The converse: writes expected.safetensors beside the model with what this program computes in f32 (two
// random sequences), for another program to compare with.
void record_expectation(const Exec& ex, const std::filesystem::path& dir, uint64_t seed);

}  // namespace ssm
