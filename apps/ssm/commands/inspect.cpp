#include "apps/ssm/commands/inspect.h"

#include <cstdio>
#include <map>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/models/registry.h"

namespace ssm::cli {
namespace {

// "backbone.layers.3.mixer.in_proj.weight" -> "mixer.in_proj", "backbone.embeddings.weight" -> "embeddings"
std::string part_of(const std::string& name) {
    std::string part;
    for (size_t begin = 0; begin <= name.size();) {
        const size_t end = std::min(name.find('.', begin), name.size());
        const std::string word = name.substr(begin, end - begin);
        const bool number = word.find_first_not_of("0123456789") == std::string::npos;
        if (!number && word != "backbone" && word != "layers" && word != "weight" && word != "bias") {
            part += (part.empty() ? "" : ".") + word;
        }
        begin = end + 1;
    }
    return part;
}

// Keys and values of a Transformer of this width and depth, f32: 2 layers e 4 bytes a token.
constexpr int64_t kContexts[] = {1024, 16384, 131072, 1048576};

void run(const std::string& dir, bool json) {
    const std::filesystem::path path = dir.empty() ? shipped_model() : std::filesystem::path(dir);
    const auto model = load_model(path, DType::f32);
    std::map<std::string, int64_t> parts;
    model->visit(
        [&](const std::string& name, Parameter& p) { parts[part_of(name)] += element_count(p.shape); });
    ModelState state = model->new_state(1);
    const auto state_bytes = static_cast<int64_t>(state.bytes());
    const auto layers = static_cast<int64_t>(state.layers.size());
    nlohmann::ordered_json contexts = nlohmann::ordered_json::array();
    for (const int64_t tokens : kContexts) {
        contexts.push_back({{"tokens", tokens},
                            {"state_bytes", state_bytes},
                            {"kv_cache_bytes", 2 * layers * model->spec().e * 4 * tokens}});
    }
    nlohmann::ordered_json result = {
        {"architecture", model->spec().architecture},
        {"layout", model->spec().layout == Layout::mamba_ssm ? "mamba_ssm" : "hf"},
        {"layers", layers},
        {"hidden_size", model->spec().e},
        {"vocab_size", model->vocab()},
        {"tied_embeddings", model->spec().tie_embeddings},
        {"parameters", model->parameter_count()},
        {"parameters_by_part", parts},
        {"state_bytes", state_bytes},
        {"contexts", contexts}};
    if (json) {
        print_json(result);
        return;
    }
    for (const char* key :
         {"architecture", "layout", "layers", "hidden_size", "vocab_size", "tied_embeddings"}) {
        std::printf("%-16s %s\n", key, result[key].dump().c_str());
    }
    std::printf("%-16s %lld\n", "parameters", static_cast<long long>(model->parameter_count()));
    for (const auto& [part, count] : parts)
        std::printf("  %-24s %lld\n", part.c_str(), static_cast<long long>(count));
    std::printf("\n%-10s %16s %34s\n", "tokens", "state bytes", "KV cache bytes (a Transformer, f32)");
    for (const auto& c : contexts) {
        std::printf("%-10s %16s %34s\n", c["tokens"].dump().c_str(), c["state_bytes"].dump().c_str(),
                    c["kv_cache_bytes"].dump().c_str());
    }
}

}  // namespace

void add_inspect(CLI::App& app) {
    struct Options {
        std::string dir;
        bool json = false;
    };
    auto o = std::make_shared<Options>();
    CLI::App* c = app.add_subcommand("inspect", "What a model folder holds, and what its state costs");
    c->add_option("dir", o->dir, "Model folder; without it the model that ships with ssm");
    c->add_flag("--json", o->json, "Print one JSON object");
    c->callback([o] { run(o->dir, o->json); });
}

}  // namespace ssm::cli
