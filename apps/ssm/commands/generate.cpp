#include "apps/ssm/commands/generate.h"

#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>

#include "apps/ssm/commands/common.h"
#include "ssm/generate/generator.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/mapped_file.h"
#include "ssm/models/registry.h"

namespace ssm::cli {
namespace {

struct Options {
    RunOptions run;
    StateOptions states;
    std::string model, prompt, prompt_file, ids, save_state, load_state;
    bool greedy = false;
    SamplerOptions sampler{.temperature = 0.8f, .top_p = 0.95f};
    GenerateOptions generate{};
};

std::optional<Tokenizer> tokenizer_of(const std::filesystem::path& dir) {
    if (std::filesystem::exists(dir / "tokenizer.json")) return Tokenizer::load(dir);
    read_text_file(dir / "config.json");  // its error, where this is no model folder at all
    return std::nullopt;
}

std::vector<int32_t> prompt_ids(const Options& o, const Tokenizer* tokenizer) {
    if (!o.ids.empty()) return parse_ids(o.ids);
    const std::string text = o.prompt_file.empty() ? o.prompt : read_text(o.prompt_file);
    if (text.empty()) return {};
    require(tokenizer != nullptr, "generate",
            "the model folder has no tokenizer.json; give the prompt as --ids");
    return tokenizer->encode(text, o.load_state.empty());
}

void run(Options o) {
    if (o.greedy) o.sampler.temperature = 0.0f;
    const Exec ex = o.run.exec();
    const std::filesystem::path dir = o.model.empty() ? shipped_model() : std::filesystem::path(o.model);
    const auto tokenizer = tokenizer_of(dir);
    const auto ids = prompt_ids(o, tokenizer ? &*tokenizer : nullptr);
    require(!ids.empty() || !o.load_state.empty(), "generate",
            "the prompt is empty; give --prompt, --prompt-file, --ids or --load-state");
    if (!o.save_state.empty()) AtomicFile(o.save_state);  // what cannot be saved is better known now
    const auto model = load_model(dir, o.run.type());
    model->move_to(ex);
    Session session(ex, *model, o.states.type());
    Sampler sampler(o.sampler);
    if (!o.load_state.empty()) session.load(o.load_state, sampler);

    const auto start = std::chrono::steady_clock::now();
    session.consume(ids);
    const double prefill = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (!o.run.json && !o.prompt.empty()) std::fputs(o.prompt.c_str(), stdout);
    const auto out = generate(session, sampler, tokenizer ? &*tokenizer : nullptr, *model, o.generate,
                              [&](const std::string& text) {
                                  if (o.run.json) return;
                                  std::fputs(text.c_str(), stdout);
                                  std::fflush(stdout);
                              });
    if (!o.save_state.empty()) session.save(o.save_state, sampler);

    const double prefill_rate = ids.empty() ? 0 : static_cast<double>(ids.size()) / prefill;
    const double decode_rate = out.ids.empty() ? 0 : static_cast<double>(out.ids.size()) / out.seconds;
    if (o.run.json) {
        print_json({{"prompt_ids", ids},
                    {"ids", out.ids},
                    {"text", out.text},
                    {"prefill_tokens_per_second", prefill_rate},
                    {"decode_tokens_per_second", decode_rate},
                    {"state_bytes", session.state_bytes()},
                    {"weights_bytes", model->weight_bytes()}});
        return;
    }
    if (!tokenizer) {
        for (const int32_t id : out.ids) std::printf("%d ", id);
    }
    std::printf("\n");
    std::fflush(stdout);
    std::fprintf(stderr,
                 "\n%zu tokens read at %.0f tokens/s, %zu written at %.0f tokens/s; state %zu bytes, weights "
                 "%.1f MB\n",
                 ids.size(), prefill_rate, out.ids.size(), decode_rate, session.state_bytes(),
                 static_cast<double>(model->weight_bytes()) / 1e6);
}

}  // namespace

void add_generate(CLI::App& app) {
    auto o = std::make_shared<Options>();
    CLI::App* c = app.add_subcommand("generate", "Continue a text");
    c->add_option("--model", o->model, "Model folder; without it the model that ships with ssm");
    auto* prompt = c->add_option_group("prompt", "What to continue");
    prompt->add_option("--prompt", o->prompt, "Text");
    prompt->add_option("--prompt-file", o->prompt_file, "File with text, also .zst; - is stdin");
    prompt->add_option("--ids", o->ids, "Token ids: \"1 2 3\"");
    prompt->require_option(0, 1);
    c->add_option("-n,--tokens", o->generate.max_tokens, "New tokens at most")
        ->check(kNotNegative)
        ->capture_default_str();
    c->add_flag("--greedy", o->greedy, "Always the most likely token");
    c->add_option("--temperature", o->sampler.temperature, "Flattens (> 1) or sharpens (< 1); 0 is greedy")
        ->capture_default_str();
    c->add_option("--top-k", o->sampler.top_k, "Keep the k most likely tokens; 0: all")
        ->capture_default_str();
    c->add_option("--top-p", o->sampler.top_p, "Keep the smallest set that has this probability")
        ->capture_default_str();
    c->add_option("--min-p", o->sampler.min_p, "Keep tokens at least this likely, relative to the likeliest")
        ->capture_default_str();
    c->add_option("--repetition-penalty", o->sampler.repetition_penalty,
                  "Makes tokens seen before less likely (> 1)")
        ->capture_default_str();
    c->add_option("--seed", o->sampler.seed, "Of the random numbers")->capture_default_str();
    c->add_option("--stop", o->generate.stop, "End before this text (may be repeated)")
        ->allow_extra_args(false);
    c->add_flag("--ignore-eos", o->generate.ignore_eos, "Go on after an end-of-text token");
    c->add_option("--save-state", o->save_state, "Write the state afterwards, to go on later");
    c->add_option("--load-state", o->load_state, "Start from a saved state");
    o->states.add_to(*c);
    o->run.add_to(*c);
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
