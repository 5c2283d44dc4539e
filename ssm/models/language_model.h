// LanguageModel: embedding, a list of residual blocks (norm, then mixer), a final norm and a head. Every
// architecture of the line is such a list; ssm/models/<name> says which, and what its tensors are called.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ssm/nn/linear.h"
#include "ssm/nn/mixer.h"

namespace ssm {

// The two layouts a checkpoint comes in: Hugging Face transformers', and that of the original mamba_ssm
// package.
enum class Layout { hugging_face, mamba_ssm };

// What an architecture makes of a config.json: everything needed to build the model.
struct ModelSpec {
    std::string architecture;  // the registry's name
    Layout layout = Layout::hugging_face;
    std::string config;  // the config.json text, as read or to be written
    int64_t vocab = 0, e = 0;
    float norm_eps = 1e-5f;
    bool tie_embeddings = true;
    double embedding_deviation = 0.02;  // of a new model
    std::string embedding_name, final_norm_name, head_name;
    struct Layer {
        std::string norm_name, mixer_name;
        std::unique_ptr<Mixer> mixer;
    };
    std::vector<Layer> layers;
    std::vector<int32_t> eos;  // ids that end a text
};

// The states of all layers for s sequences.
class ModelState {
public:
    std::vector<std::unique_ptr<MixerState>> layers;
    void visit(const std::function<void(const std::string& name, Tensor&)>& f);
    size_t bytes();
};

class LanguageModel {
public:
    explicit LanguageModel(ModelSpec spec);

    const ModelSpec& spec() const { return spec_; }
    int64_t vocab() const { return spec_.vocab; }
    DType dtype() const { return embedding_.value().dtype(); }

    // Every parameter once, by its checkpoint name, in the order of the computation.
    void visit(const ParameterVisitor& f);
    int64_t parameter_count();
    // Elements of the matrices that every token meets: not an embedding that is only looked up.
    int64_t matrix_elements(bool with_head = true);
    size_t weight_bytes();

    // New f32 parameters, drawn from `seed`.
    void initialise(uint64_t seed);
    // Moves the parameters to ex's device; states are made there from then on. Everything that runs the model
    // afterwards must run on it. On the CPU at first.
    void move_to(const Exec& ex);
    // Marks every parameter as wanting a gradient, which is f32. On the CPU all must be f32; on a GPU the
    // matrices may be bf16, rounded from what an optimiser keeps.
    void require_grad();
    // A number that differs between models: config, names, shapes and samples of the weights.
    uint64_t fingerprint();

    // Zero; `sums` of the recurrences' states: bf16 for step() on a GPU alone.
    ModelState new_state(int64_t sequences, DType sums = DType::f32) const;

    // ids [t] (host memory) -> [t e], after the final norm. ctx.cu_seqlens splits the tokens; empty with a
    // state: one token of each sequence. Throws for ids outside [0, vocab).
    Var hidden(Ctx& ctx, View<const int32_t, 1> ids, ModelState* state);
    // The same with ids on the device, unchecked.
    Var hidden(Ctx& ctx, const Tensor& ids, ModelState* state);
    void require_ids(View<const int32_t, 1> ids) const;  // throws for one outside [0, vocab)
    // One token of each of b sequences, by few kernels: ids [b] i32 on ctx's device (a GPU's are not checked)
    // -> logits [b vocab] f32. The state's rows by ctx.slots. Waits for nothing: a GPU's can be captured.
    void step(Ctx& ctx, const Tensor& ids, ModelState& state, const Tensor& logits);
    // [t e] -> [t vocab] f32
    Tensor logits(Ctx& ctx, const Tensor& hidden);
    // nll [t] (host memory) of targets under the logits, without holding these.
    void nll(Ctx& ctx, const Tensor& hidden, View<const int32_t, 1> targets, View<float, 1> nll);
    // Mean over the targets >= 0, a scalar on the device.
    Var loss(Ctx& ctx, View<const int32_t, 1> ids, View<const int32_t, 1> targets);
    // sum_t weights[t] nll[t] with ids, targets [t] i32 and weights [t] f32 on the device: nothing waits.
    Var loss(Ctx& ctx, const Tensor& ids, const Tensor& targets, const Tensor& weights);

private:
    struct Block {
        Parameter norm_weight;
        std::string norm_name, mixer_name;
        std::unique_ptr<Mixer> mixer;
    };
    const PackedWeight& packed_head();

    ModelSpec spec_;
    Parameter embedding_, final_norm_, head_;
    std::vector<Block> blocks_;
    PackedWeight packed_head_;
    Exec home_;
};

}  // namespace ssm
