// Builds a small Mamba, draws its parameters and takes one step: through the installed headers only.
#include <cstdio>

#include <ssm/models/registry.h>

int main() {
    const ssm::Exec ex = ssm::make_cpu_exec(1);
    const auto text = ssm::find_architecture("mamba").new_config({.vocab = 32, .e = 16, .layers = 2});
    const auto model = ssm::build_model(text, "config");
    model->initialise(1);
    ssm::ModelState state = model->new_state(1);
    ssm::Ctx ctx{.exec = ex};
    const int32_t id = 3;
    const ssm::Var hidden = model->hidden(ctx, {&id, {1}}, &state);
    const ssm::Tensor logits = model->logits(ctx, hidden.value());
    std::printf("%lld parameters, %lld logits\n", static_cast<long long>(model->parameter_count()),
                static_cast<long long>(logits.size()));
    return logits.size() == 32 ? 0 : 1;
}
