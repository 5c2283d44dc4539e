// What a module owns and how others reach it. `visit` names every parameter once; checkpoints, the optimiser,
// `ssm inspect` and the initialiser all go through it.
#pragma once

#include <functional>
#include <string>

#include "ssm/autograd/tape.h"
#include "ssm/core/random.h"

namespace ssm {

struct Parameter {
    enum class Kind {
        matrix,  // of a linear layer or embedding: f32 or bf16, decayed
        vector,  // norm weights, biases, A_log, D, dt_bias, convolutions: always f32
    };
    Shape shape;  // as in the checkpoint
    Kind kind = Kind::vector;
    bool weight_decay = false;
    std::function<void(Random&, const Tensor&)> init;  // fills a new model's value (f32)
    Var var;                                           // absent until the model is loaded or initialised

    const Tensor& value() const { return var.value(); }
    // Absent stays absent: an optional bias.
    explicit operator bool() const { return !shape.empty(); }
};

using ParameterVisitor = std::function<void(const std::string& name, Parameter&)>;

namespace init {
inline std::function<void(Random&, const Tensor&)> constant(float c) {
    return [c](Random&, const Tensor& t) {
        for (int64_t i = 0; i < t.size(); ++i) t.data<float>()[i] = c;
    };
}
inline std::function<void(Random&, const Tensor&)> uniform(double bound) {
    return [bound](Random& random, const Tensor& t) {
        for (int64_t i = 0; i < t.size(); ++i)
            t.data<float>()[i] = static_cast<float>(random.uniform(-bound, bound));
    };
}
inline std::function<void(Random&, const Tensor&)> normal(double deviation) {
    return [deviation](Random& random, const Tensor& t) {
        for (int64_t i = 0; i < t.size(); ++i)
            t.data<float>()[i] = static_cast<float>(deviation * random.normal());
    };
}
// softplus^-1 of a step size drawn log-uniformly from [dt_min, dt_max] (architectures' usual 1e-3 .. 1e-1).
std::function<void(Random&, const Tensor&)> dt_bias(double dt_min, double dt_max, double dt_floor);
}  // namespace init

}  // namespace ssm
