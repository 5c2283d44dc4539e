#include "ssm/models/language_model.h"

#include <cstring>

#include "ssm/ops/cross_entropy/cross_entropy.h"
#include "ssm/ops/norm_linear/norm_linear.h"

namespace ssm {
namespace {

class Fnv1a {
public:
    void add(const void* data, size_t bytes) {
        const auto* p = static_cast<const unsigned char*>(data);
        for (size_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ p[i]) * 0x100000001b3u;
    }
    uint64_t value() const { return hash_; }

private:
    uint64_t hash_ = 0xcbf29ce484222325u;
};

// The residual stream goes on with a layer's result, which nothing else reads.
Normed add_to_stream(Ctx& ctx, const std::vector<Var>& stream, const Var& weight,
                     const RmsNormOptions& norm) {
    Normed n = add_rms_norm(ctx, stream[0], stream[1], weight, norm, ctx.activation);
    if (ctx.recording({&stream[1]})) stream[1].forget_value();
    return n;
}

}  // namespace

void ModelState::visit(const std::function<void(const std::string&, Tensor&)>& f) {
    for (size_t i = 0; i < layers.size(); ++i) {
        if (layers[i]) layers[i]->visit(fmt::format("layers.{}", i), f);
    }
}

size_t ModelState::bytes() {
    size_t total = 0;
    visit([&](const std::string&, Tensor& t) { total += t.bytes(); });
    return total;
}

LanguageModel::LanguageModel(ModelSpec spec) : spec_(std::move(spec)) {
    const auto matrix = Parameter::Kind::matrix;
    const auto vector = Parameter::Kind::vector;
    embedding_ = {{spec_.vocab, spec_.e}, matrix, true, init::normal(spec_.embedding_deviation), {}};
    final_norm_ = {{spec_.e}, vector, false, init::constant(1.0f), {}};
    if (!spec_.tie_embeddings) {
        head_ = {{spec_.vocab, spec_.e}, matrix, true, init::uniform(1.0 / std::sqrt(spec_.e)), {}};
    }
    for (auto& layer : spec_.layers) {
        blocks_.push_back({{{spec_.e}, vector, false, init::constant(1.0f), {}},
                           layer.norm_name,
                           layer.mixer_name,
                           std::move(layer.mixer)});
    }
}

void LanguageModel::visit(const ParameterVisitor& f) {
    f(spec_.embedding_name, embedding_);
    for (Block& block : blocks_) {
        f(block.norm_name, block.norm_weight);
        block.mixer->visit(block.mixer_name, f);
    }
    f(spec_.final_norm_name, final_norm_);
    if (head_) f(spec_.head_name, head_);
}

int64_t LanguageModel::parameter_count() {
    int64_t count = 0;
    visit([&](const std::string&, Parameter& p) { count += element_count(p.shape); });
    return count;
}

int64_t LanguageModel::matrix_elements(bool with_head) {
    int64_t count = 0;
    visit([&](const std::string& name, Parameter& p) {
        const bool head = name == (head_ ? spec_.head_name : spec_.embedding_name);
        if (p.kind != Parameter::Kind::matrix || (name == spec_.embedding_name && !head)) return;
        if (!head || with_head) count += element_count(p.shape);
    });
    return count;
}

size_t LanguageModel::weight_bytes() {
    size_t bytes = 0;
    visit([&](const std::string&, Parameter& p) { bytes += p.value().bytes(); });
    return bytes;
}

void LanguageModel::initialise(uint64_t seed) {
    Random random(seed);
    visit([&](const std::string&, Parameter& p) {
        Tensor value = Tensor::empty(p.shape);
        p.init(random, value);
        p.var = Var(value);
    });
}

void LanguageModel::require_grad() {
    visit([&](const std::string& name, Parameter& p) {
        const bool rounded = home_.device != Device::cpu && p.kind == Parameter::Kind::matrix &&
                             p.value().dtype() == DType::bf16;
        require(p.value().dtype() == DType::f32 || rounded, "model",
                "parameter '{}' is {}; training needs f32", name, name_of(p.value().dtype()));
        p.var = Var(p.value(), true);
    });
}

uint64_t LanguageModel::fingerprint() {
    constexpr size_t kSample = 4096;  // bytes from each end of a tensor
    Fnv1a hash;
    hash.add(spec_.architecture.data(), spec_.architecture.size());
    visit([&](const std::string& name, Parameter& p) {
        const Tensor t = p.value().to_host();
        hash.add(name.data(), name.size());
        hash.add(t.shape().data(), t.shape().size() * sizeof(int64_t));
        const size_t sample = std::min(kSample, t.bytes());
        hash.add(t.raw(), sample);
        hash.add(t.raw() + t.bytes() - sample, sample);
    });
    return hash.value();
}

ModelState LanguageModel::new_state(int64_t sequences, DType sums) const {
    ModelState state;
    for (const Block& block : blocks_)
        state.layers.push_back(block.mixer->new_state(home_, sequences, {dtype(), sums}));
    return state;
}

void LanguageModel::move_to(const Exec& ex) {
    visit([&](const std::string&, Parameter& p) { p.var = Var(p.value().to(ex), p.var.requires_grad()); });
    packed_head_ = {};
    home_ = ex;
}

void LanguageModel::require_ids(View<const int32_t, 1> ids) const {
    for (int64_t t = 0; t < ids.shape[0]; ++t)
        require(ids(t) >= 0 && ids(t) < spec_.vocab, "embedding",
                "ids[{}] = {} is outside the vocabulary [0, {})", t, ids(t), spec_.vocab);
}

Var LanguageModel::hidden(Ctx& ctx, View<const int32_t, 1> ids, ModelState* state) {
    require_ids(ids);
    return hidden(ctx, on_device_of(ctx.exec, ids), state);
}

Var LanguageModel::hidden(Ctx& ctx, const Tensor& ids, ModelState* state) {
    require(state == nullptr || state->layers.size() == blocks_.size(), "model",
            "the state has {} layers but the model {}", state ? state->layers.size() : 0, blocks_.size());
    const RmsNormOptions norm{.eps = spec_.norm_eps};
    std::vector<Var> stream{embedding(ctx, ids, embedding_.var), Var()};  // the residual, a layer's result
    for (size_t i = 0; i < blocks_.size(); ++i) {
        MixerState* const layer = state != nullptr ? state->layers[i].get() : nullptr;
        stream = recomputed(ctx, stream, [this, norm, layer, i](Ctx& c, const std::vector<Var>& in) {
            const Block& block = blocks_[i];
            const Normed n = add_to_stream(c, in, block.norm_weight.var, norm);
            const Var y = block.mixer->forward(c, n.y, layer);
            remade(c, n.y, [sum = n.residual, norm, weight = block.norm_weight.var](Ctx& again) {
                return rms_norm(again, sum, weight, Var(), norm, again.activation);
            });
            return std::vector<Var>{n.residual, y};
        });
    }
    return add_to_stream(ctx, stream, final_norm_.var, norm).y;
}

void LanguageModel::step(Ctx& ctx, const Tensor& ids, ModelState& state, const Tensor& logits) {
    require(state.layers.size() == blocks_.size(), "model", "the state has {} layers but the model {}",
            state.layers.size(), blocks_.size());
    const Tensor residual = embedding(ctx, ids, embedding_.var).value();
    const auto weight = [](const Parameter& p) { return p.value().view<const float, 1>(); };
    for (size_t i = 0; i < blocks_.size(); ++i) {
        Block& block = blocks_[i];
        const Tensor& next =
            i + 1 < blocks_.size() ? blocks_[i + 1].mixer->first_weight() : packed_head().weight();
        block.mixer->step(ctx, {weight(block.norm_weight), spec_.norm_eps}, residual, *state.layers[i], next);
    }
    norm_linear(ctx.exec,
                {.x = residual,
                 .norm = RmsNormOptions{.eps = spec_.norm_eps},
                 .norm_weight = weight(final_norm_),
                 .weight = packed_head()},
                logits);
}

const PackedWeight& LanguageModel::packed_head() {
    const Tensor& weight = (head_ ? head_ : embedding_).value();
    if (!packed_head_ || packed_head_.weight().raw() != weight.raw()) packed_head_ = PackedWeight(weight);
    return packed_head_;
}

Tensor LanguageModel::logits(Ctx& ctx, const Tensor& hidden) {
    Tensor y = Tensor::empty(ctx.exec, {hidden.dim(0), spec_.vocab});
    linear(ctx.exec, hidden, packed_head(), {}, y);
    return y;
}

void LanguageModel::nll(Ctx& ctx, const Tensor& hidden, View<const int32_t, 1> targets, View<float, 1> nll) {
    const Tensor there = on_device_of(ctx.exec, targets),
                 result = Tensor::empty(ctx.exec, {targets.shape[0]});
    linear_cross_entropy(ctx.exec, hidden, packed_head(), there.view<const int32_t, 1>(),
                         result.view<float, 1>());
    const Tensor host = result.to_host();
    for (int64_t i = 0; i < nll.shape[0]; ++i) nll(i) = host.data<float>()[i];
}

Var LanguageModel::loss(Ctx& ctx, View<const int32_t, 1> ids, View<const int32_t, 1> targets) {
    require_ids(ids);
    const int64_t t = targets.shape[0];
    int64_t counted = 0;
    for (int64_t i = 0; i < t; ++i) counted += targets(i) >= 0;
    require(counted > 0, "cross_entropy", "every one of the {} targets is ignored", t);
    const std::vector<float> each(static_cast<size_t>(t), 1.0f / static_cast<float>(counted));
    return loss(ctx, on_device_of(ctx.exec, ids), on_device_of(ctx.exec, targets),
                Tensor::from_floats({t}, each).to(ctx.exec));
}

Var LanguageModel::loss(Ctx& ctx, const Tensor& ids, const Tensor& targets, const Tensor& weights) {
    if (!ctx.inference()) packed_head_ = {};  // the weight is about to change
    const Var h = hidden(ctx, ids, nullptr);
    const Var loss = linear_cross_entropy(ctx, h, (head_ ? head_ : embedding_).var, targets, weights);
    if (ctx.recording({&h})) h.forget_value();  // its gradient is there
    return loss;
}

}  // namespace ssm
