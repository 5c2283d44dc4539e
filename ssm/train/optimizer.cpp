#include "ssm/train/optimizer.h"

#include <cmath>
#include <set>

#include "ssm/io/safetensors/safetensors.h"
#include "ssm/ops/adamw/adamw.h"

namespace ssm {

Optimizer::Optimizer(Exec exec, std::vector<TrainedParameter> parameters, OptimizerOptions options)
    : exec_(std::move(exec)), parameters_(std::move(parameters)), options_(options) {
    std::set<std::string> names;
    for (const TrainedParameter& p : parameters_) {
        require(names.insert(p.name).second, "optimizer", "two parameters are called `{}`", p.name);
        require(p.value.dtype() == DType::f32 && p.value.dense() && p.grad.dtype() == DType::f32 &&
                    p.grad.dense() && p.grad.shape() == p.value.shape(),
                "optimizer", "`{}` and its gradient must be dense, f32 and of one shape", p.name);
        m_.push_back(Tensor::zeros(p.value.shape()));
        v_.push_back(Tensor::zeros(p.value.shape()));
    }
    std::vector<AdamWParameter> all;
    for (size_t i = 0; i < parameters_.size(); ++i) {
        const TrainedParameter& p = parameters_[i];
        all.push_back({p.value.view<float, 1>(),
                       p.grad.view<float, 1>(),
                       m_[i].view<float, 1>(),
                       v_[i].view<float, 1>(),
                       {},
                       p.weight_decay ? static_cast<float>(options_.weight_decay) : 0.0f});
    }
    table_ = std::make_unique<AdamWTable>(exec_, std::move(all));
}

Optimizer::~Optimizer() = default;

double Optimizer::gradient_norm() const {
    float norm = 0;
    ssm::gradient_norm(exec_, *table_, {&norm, {1}});
    return static_cast<double>(norm);
}

const TrainedParameter* Optimizer::broken_gradient() const {
    for (const TrainedParameter& p : parameters_) {
        const auto* g = p.grad.data<const float>();
        for (int64_t i = 0, n = p.grad.size(); i < n; ++i) {
            if (!std::isfinite(g[i])) return &p;
        }
    }
    return nullptr;
}

void Optimizer::zero_gradients() const {
    for (const TrainedParameter& p : parameters_) p.grad.fill_zero();
}

void Optimizer::step(int64_t step, double learning_rate, double scale) const {
    const AdamWOptions o{.beta1 = static_cast<float>(options_.beta1),
                         .beta2 = static_cast<float>(options_.beta2),
                         .eps = static_cast<float>(options_.eps),
                         .clip = static_cast<float>(scale)};
    const auto bias = [&](float beta) {
        return static_cast<float>(1.0 - std::pow(static_cast<double>(beta), static_cast<double>(step)));
    };
    const float rates[] = {static_cast<float>(learning_rate), bias(o.beta1), bias(o.beta2)};
    const float one = 1.0f;  // min(1, clip / norm) is the scale
    adamw_step(exec_, *table_, o, {rates, {3}}, {&one, {1}});
}

void Optimizer::save(const std::filesystem::path& file) const {
    std::vector<NamedTensor> tensors;
    for (size_t i = 0; i < parameters_.size(); ++i) {
        tensors.push_back({"m." + parameters_[i].name, m_[i]});
        tensors.push_back({"v." + parameters_[i].name, v_[i]});
    }
    write_safetensors(file, tensors, {{"format", "ssm-adamw"}});
}

void Optimizer::load(const std::filesystem::path& file) {
    const SafetensorsFile f = SafetensorsFile::open(file);
    if (f.tensors().size() != 2 * parameters_.size()) {
        fail(ErrorCode::bad_file, "optimizer", "`{}` has {} tensors but the model needs {}", file.string(),
             f.tensors().size(), 2 * parameters_.size());
    }
    for (size_t i = 0; i < parameters_.size(); ++i) {
        const Shape& shape = parameters_[i].value.shape();
        m_[i].copy_from(f.tensor("m." + parameters_[i].name, shape));
        v_[i].copy_from(f.tensor("v." + parameters_[i].name, shape));
    }
}

}  // namespace ssm
