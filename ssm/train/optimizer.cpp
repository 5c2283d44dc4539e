#include "ssm/train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "ssm/io/safetensors/safetensors.h"
#include "ssm/ops/adamw/adamw.h"
#include "ssm/ops/elementwise/elementwise.h"

namespace ssm {

Optimizer::Optimizer(Exec exec, std::vector<TrainedParameter> parameters, OptimizerOptions options)
    : exec_(std::move(exec)),
      parameters_(std::move(parameters)),
      options_(options),
      rates_(exec_, {3}, DType::f32),
      status_(exec_, {2}) {
    std::set<std::string> names;
    for (const TrainedParameter& p : parameters_) {
        require(names.insert(p.name).second, "optimizer", "two parameters are called `{}`", p.name);
        require(p.value.dtype() == DType::f32 && p.value.dense() && p.grad.dtype() == DType::f32 &&
                    p.grad.dense() && p.grad.shape() == p.value.shape(),
                "optimizer", "`{}` and its gradient must be dense, f32 and of one shape", p.name);
        m_.push_back(Tensor::zeros(exec_, p.value.shape()));
        v_.push_back(Tensor::zeros(exec_, p.value.shape()));
    }
    std::vector<AdamWParameter> all;
    for (size_t i = 0; i < parameters_.size(); ++i) {
        const TrainedParameter& p = parameters_[i];
        all.push_back({p.value.view<float, 1>(), p.grad.view<float, 1>(), m_[i].view<float, 1>(),
                       v_[i].view<float, 1>(), p.rounded.view_if<bf16, 1>(),
                       p.weight_decay ? static_cast<float>(options_.weight_decay) : 0.0f, p.sets_grad});
    }
    table_ = std::make_unique<AdamWTable>(exec_, std::move(all));
}

Optimizer::~Optimizer() = default;

void Optimizer::zero_gradients() const {
    for (const TrainedParameter& p : parameters_) p.grad.fill_zero();
}

void Optimizer::set_rate(int64_t step, double learning_rate) {
    const auto bias = [&](double beta) {
        return static_cast<float>(
            1.0 - std::pow(static_cast<double>(static_cast<float>(beta)), static_cast<double>(step)));
    };
    const std::span<float> rates = rates_.fill<float>();
    rates[0] = static_cast<float>(learning_rate);
    rates[1] = bias(options_.beta1);
    rates[2] = bias(options_.beta2);
    rates_.send();
}

void Optimizer::step() {
    const Tensor norm = status_.tensor().rows(1, 2);
    gradient_norm(exec_, *table_, norm.view<float, 1>());
    if (exec_.device == Device::cpu && !std::isfinite(norm.item())) {
        const auto broken = std::ranges::find_if(parameters_, [](const TrainedParameter& p) {
            const auto* g = p.grad.data<const float>();
            return !std::all_of(g, g + p.grad.size(), [](float x) { return std::isfinite(x); });
        });
        broken_ = broken != parameters_.end() ? &*broken : nullptr;
    }
    const AdamWOptions o{.beta1 = static_cast<float>(options_.beta1),
                         .beta2 = static_cast<float>(options_.beta2),
                         .eps = static_cast<float>(options_.eps),
                         .clip = static_cast<float>(options_.clip)};
    adamw_step(exec_, *table_, o, rates_.tensor().view<const float, 1>(), norm.view<const float, 1>());
}

Optimizer::Status Optimizer::status() {
    const std::span<const float> both = status_.get();
    return {static_cast<double>(both[0]), static_cast<double>(both[1])};
}

void Optimizer::round_parameters() const {
    for (const TrainedParameter& p : parameters_) {
        if (p.rounded) cast(exec_, p.value.view<const float, 2>(), p.rounded.view<bf16, 2>());
    }
}

void Optimizer::save(const std::filesystem::path& file) const {
    std::vector<NamedTensor> tensors;
    for (size_t i = 0; i < parameters_.size(); ++i) {
        tensors.push_back({"m." + parameters_[i].name, m_[i].to_host()});
        tensors.push_back({"v." + parameters_[i].name, v_[i].to_host()});
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
