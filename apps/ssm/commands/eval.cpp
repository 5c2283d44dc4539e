#include "apps/ssm/commands/eval.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <numbers>

#include "apps/ssm/commands/common.h"
#include "ssm/generate/evaluate.h"
#include "ssm/io/ids.h"
#include "ssm/io/tokenizer/tokenizer.h"
#include "ssm/models/registry.h"

namespace ssm::cli {
namespace {

struct Options {
    RunOptions run;
    std::string model, ids, text, ids_type = "uint16";
    EvaluateOptions evaluate{};
};

void run(const Options& o) {
    require(o.ids.empty() != o.text.empty(), "eval", "give either --ids FILE or --text FILE");
    const Exec ex = o.run.exec();
    const std::filesystem::path dir = o.model.empty() ? shipped_model() : std::filesystem::path(o.model);
    std::vector<int32_t> ids;
    size_t text_bytes = 0;
    if (!o.ids.empty()) {
        ids = read_ids(o.ids, id_type_from_name(o.ids_type));
    } else {
        const std::string text = read_text(o.text);
        text_bytes = text.size();
        ids = Tokenizer::load(dir).encode(text, true);
    }
    const auto model = load_model(dir, o.run.type());
    model->move_to(ex);
    const bool terminal = isatty(STDERR_FILENO) != 0;
    const Evaluation e = evaluate(ex, *model, ids, o.evaluate, [&](const Evaluation& now) {
        if (!terminal) return;
        std::fprintf(stderr, "\r%lld of %zu tokens, mean_nll %.4f, %.0f tokens/s ",
                     static_cast<long long>(now.tokens), ids.size() - 1, now.mean_nll(),
                     static_cast<double>(now.tokens) / now.seconds);
    });
    if (terminal) std::fprintf(stderr, "\n");
    nlohmann::ordered_json result = {{"tokens", e.tokens},
                                     {"mean_nll", e.mean_nll()},
                                     {"perplexity", std::exp(e.mean_nll())},
                                     {"tokens_per_second", static_cast<double>(e.tokens) / e.seconds}};
    if (text_bytes > 0) {
        result["bits_per_byte"] = e.nll / std::numbers::ln2 / static_cast<double>(text_bytes);
    }
    if (o.run.json) {
        print_json(result);
        return;
    }
    for (const auto& [key, value] : result.items()) std::printf("%s %s\n", key.c_str(), value.dump().c_str());
}

}  // namespace

void add_eval(CLI::App& app) {
    auto o = std::make_shared<Options>();
    CLI::App* c = app.add_subcommand("eval", "Likelihood of a text or of token ids");
    c->add_option("--model", o->model, "Model folder; without it the model that ships with ssm");
    c->add_option("--ids", o->ids, "File of little-endian token ids");
    c->add_option("--ids-type", o->ids_type, "Their type")
        ->check(CLI::IsMember({"uint16", "uint32", "u16", "u32"}))
        ->capture_default_str();
    c->add_option("--text", o->text, "File of text, also .zst; - is stdin");
    c->add_option("--window", o->evaluate.window,
                  "Predicted tokens in a window; each starts from the empty state")
        ->check(kPositive)
        ->capture_default_str();
    c->add_flag("--carry-state", o->evaluate.carry_state, "Go on from the state of the window before");
    o->run.add_to(*c);
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
