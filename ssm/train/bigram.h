// The smallest language model, for tests of the trainer: logits[next] = table[id, next] + bias[next], with
// its gradient as a plain loop.
#pragma once

#include <cmath>
#include <functional>

#include "ssm/io/safetensors/checkpoint.h"
#include "ssm/train/trainable.h"

namespace ssm::test {

class Bigram final : public Trainable {
public:
    explicit Bigram(int64_t v) : v_(v) {
        all_.push_back({"table.weight", Tensor::zeros({v, v}), Tensor::zeros({v, v}), true});
        all_.push_back({"bias", Tensor::zeros({v}), Tensor::zeros({v}), false});
    }
    std::vector<TrainedParameter> parameters() override { return all_; }
    double loss(const Batch& batch) override { return pass(batch, 0.0, false); }
    void set_batches(std::span<const Batch> batches, std::span<const double> weights) override {
        batches_.assign(batches.begin(), batches.end());
        weights_.assign(weights.begin(), weights.end());
    }
    void add_gradients(const Tensor& loss) override {
        double sum = 0;
        for (size_t i = 0; i < batches_.size(); ++i) {
            if (weights_[i] != 0) sum += weights_[i] * pass(batches_[i], weights_[i], true);
            if (after) after(*this);
        }
        loss.data<float>()[0] = static_cast<float>(sum);
    }
    void save(const std::filesystem::path& folder) override {
        write_checkpoint(folder, {{all_[0].name, all_[0].value}, {all_[1].name, all_[1].value}});
    }

    std::function<void(Bigram&)> after;  // runs after each add_gradients

private:
    double pass(const Batch& batch, double weight, bool gradients) {
        const auto* table = all_[0].value.data<const float>();
        const auto* bias = all_[1].value.data<const float>();
        std::vector<double> p(static_cast<size_t>(v_));
        double sum = 0;
        for (int64_t t = 0; t < batch.tokens(); ++t) {
            const int64_t row = batch.ids[t] * v_, target = batch.targets[t];
            if (target < 0) continue;
            double total = 0;
            for (int64_t j = 0; j < v_; ++j)
                total += p[j] = std::exp(static_cast<double>(table[row + j] + bias[j]));
            sum += std::log(total / p[target]);
            if (!gradients) continue;
            const double scale = weight / static_cast<double>(batch.counted());
            for (int64_t j = 0; j < v_; ++j) {
                const auto g = static_cast<float>(scale * (p[j] / total - (j == target ? 1.0 : 0.0)));
                all_[0].grad.data<float>()[row + j] += g;
                all_[1].grad.data<float>()[j] += g;
            }
        }
        return sum / static_cast<double>(batch.counted());
    }
    int64_t v_;
    std::vector<TrainedParameter> all_;
    std::vector<Batch> batches_;
    std::vector<double> weights_;
};

// Text with structure: words of a small list.
inline std::string story(int words, uint64_t seed) {
    constexpr const char* kWords[] = {"the ",   "cat ", "sat ", "on ",    "a ",
                                      "mat.\n", "it ",  "was ", "happy. "};
    std::string text;
    uint64_t x = seed;
    for (int i = 0; i < words; ++i) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        text += kWords[(x >> 33) % 9];
        if (i % 50 == 49) text += "\n<|endoftext|>\n";
    }
    return text;
}

}  // namespace ssm::test
