#include "apps/ssm/commands/train.h"

#include <charconv>
#include <cstdio>
#include <map>
#include <memory>

#include <fmt/format.h>

#include "apps/ssm/commands/common.h"
#include "apps/ssm/commands/run_recipe.h"
#include "apps/ssm/commands/stop_on_signal.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/json/config_reader.h"
#include "ssm/io/mapped_file.h"
#include "ssm/models/registry.h"
#include "ssm/ops/linear/linear_rates.h"
#include "ssm/train/encoder.h"
#include "ssm/train/hash.h"
#include "ssm/train/text_validator.h"
#include "ssm/train/trained_language_model.h"
#include "ssm/train/trainer.h"

namespace ssm::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
    std::string arch, config, init_from, tokenizer, out, cache, recipe;
    std::vector<std::string> data, valid;
    double repeat = 1;
    NewModel shape;
    DocumentOptions documents;
    BatchSamplerOptions sampler;
    int64_t valid_tokens = 0;  // 0: all
    TrainOptions train;
    std::string device = "cpu", dtype = "f32";
    std::string recompute;
    bool deterministic = false;
    int threads = 0;
    bool untied = false, resume = false, json = false, quiet = false;
};

// "stories.txt.zst:2.5" -> the file and how often an epoch visits it.
std::pair<std::string, double> split_weight(const std::string& argument, double otherwise) {
    const size_t colon = argument.rfind(':');
    if (colon == std::string::npos || colon + 1 == argument.size()) return {argument, otherwise};
    double weight = 0;
    const char* end = argument.data() + argument.size();
    const auto [rest, error] = std::from_chars(argument.data() + colon + 1, end, weight);
    if (error != std::errc() || rest != end) return {argument, otherwise};
    return {argument.substr(0, colon), weight};
}

// The texts as ids; adds what they are to the run's identity.
std::vector<WeightedFile> open_corpus(const Exec& ex, const Options& o, const TextEncoder& encoder,
                                      const std::vector<std::string>& files, std::vector<std::string>& notes,
                                      std::string& identity) {
    const fs::path cache = o.cache.empty() ? o.train.out / "cache" : fs::path(o.cache);
    std::vector<WeightedFile> corpus;
    for (const std::string& argument : files) {
        const auto [name, weight] = split_weight(argument, o.repeat);
        bool built = false;
        corpus.push_back({TokenFile::open(ex, name, cache, encoder, o.documents, &built), weight});
        const TokenFile& t = corpus.back().tokens;
        notes.push_back(fmt::format("{}: {} documents, {} tokens, {:.3f} bytes each{}", name, t.documents(),
                                    t.tokens(),
                                    static_cast<double>(t.text_bytes()) / static_cast<double>(t.tokens()),
                                    built ? "" : " (from the cache)"));
        identity += fmt::format("{}{:016x}:{}", identity.empty() ? "" : " ", t.content_hash(), weight);
    }
    return corpus;
}

std::string config_of(const Options& o, const TextEncoder& encoder) {
    if (!o.config.empty()) return read_text_file(o.config);
    NewModel shape = o.shape;
    shape.vocab = encoder.vocabulary;
    shape.eos = encoder.end_of_document;
    return find_architecture(o.arch).new_config(shape);
}

// A model in the original layout continues in Hugging Face's, the one that is written.
std::unique_ptr<LanguageModel> load_for_training(const fs::path& dir) {
    auto model = load_model(dir, DType::f32);
    if (model->spec().layout == Layout::hugging_face) return model;
    const ConfigReader config = ConfigReader::parse(model->spec().config, "config");
    auto converted = build_model(
        find_architecture(model->spec().architecture).convert_config(config, Layout::hugging_face), "config");
    std::vector<Var> values;
    model->visit([&](const std::string&, Parameter& p) { values.push_back(p.var); });
    size_t i = 0;
    converted->visit([&](const std::string&, Parameter& p) { p.var = values[i++]; });
    return converted;
}

std::unique_ptr<LanguageModel> make_model(const Options& o, const TextEncoder& encoder) {
    if (!o.init_from.empty()) return load_for_training(o.init_from);
    auto model = build_model(config_of(o, encoder), o.config.empty() ? "config" : o.config);
    model->initialise(o.sampler.seed);
    return model;
}

TextEncoder make_encoder(const Options& o) {
    if (!o.tokenizer.empty()) return tokenizer_encoder(o.tokenizer, o.documents.separator);
    if (!o.init_from.empty() && fs::exists(fs::path(o.init_from) / "tokenizer.json")) {
        return tokenizer_encoder(o.init_from, o.documents.separator);
    }
    return byte_encoder();
}

std::string generation_config(const TextEncoder& e) {
    const Json config = {{"bos_token_id", e.end_of_document},
                         {"eos_token_id", e.end_of_document},
                         {"pad_token_id", e.end_of_document}};
    return config.dump(2) + '\n';
}

Json to_json(const TrainSummary& s, int64_t parameters) {
    Json j = {{"steps", s.step},
              {"tokens", s.tokens},
              {"loss", s.loss},
              {"tokens_per_second", s.tokens_per_second},
              {"seconds", s.seconds},
              {"parameters", parameters},
              {"checkpoint", s.checkpoint.string()},
              {"stopped", s.stopped}};
    if (s.valid) {
        j["valid_loss"] = s.valid->loss;
        j["bits_per_byte"] = s.valid->bits_per_byte.value();
        j["valid_tokens"] = s.valid->tokens;
    }
    return j;
}

void run(Options& o, const CLI::App& command) {
    require(!o.arch.empty() + !o.config.empty() + !o.init_from.empty() == 1, "train",
            "give one of --arch, --config and --init-from");
    require(!o.data.empty(), "train", "no text to train on: give --data FILE");
    const bool cuda = o.device == "cuda", bf16 = o.dtype == "bf16";
    const Recompute recompute = recompute_of(o.recompute, cuda ? Device::cuda : Device::cpu);
    const Exec host = make_cpu_exec(o.threads);
    Exec ex = cuda ? make_cuda_exec() : host;
    ex.deterministic = o.deterministic;
    if (bf16) ex.matmul = MatmulPrecision::bf16;
    std::vector<std::string> notes;  // shown once nothing can be wrong any more

    const TextEncoder encoder = make_encoder(o);
    const auto model = make_model(o, encoder);
    require(encoder.vocabulary <= model->vocab(), "train",
            "the tokenizer has {} ids but the model's vocabulary is {}", encoder.vocabulary, model->vocab());
    std::map<std::string, std::string>& identity = o.train.identity;
    auto data = open_corpus(host, o, encoder, o.data, notes, identity["data"]);
    std::string not_identity;
    auto valid = open_corpus(host, o, encoder, o.valid, notes, not_identity);
    identity["config"] = fmt::format("{:016x}", hash_bytes(model->spec().config));
    identity["tokenizer"] = fmt::format("{:016x}", encoder.fingerprint);
    identity["dtype"] = o.dtype;
    o.train.files = {{"tokenizer.json", encoder.tokenizer_json},
                     {"generation_config.json", generation_config(encoder)}};

    TrainedLanguageModel trained(ex, *model,
                                 {.dtype = cuda && bf16 ? DType::bf16 : DType::f32, .recompute = recompute});
    if (!o.quiet)  // on a GPU with memory of its own, which is given back
        o.train.peak_flops =
            measure_matrix_rate(cuda ? make_cuda_exec() : ex, bf16 ? DType::bf16 : DType::f32);
    std::unique_ptr<Validator> validator;
    if (!valid.empty()) {
        validator = std::make_unique<TextValidator>(trained, std::move(valid), o.sampler.length,
                                                    o.sampler.batch, o.valid_tokens);
    }
    Trainer trainer(ex, trained, std::make_unique<BatchSampler>(std::move(data), o.sampler),
                    std::move(validator), o.train, o.resume, o.quiet ? nullptr : stderr);
    notes.push_back(fmt::format("{}: {} parameters; {} at step {}", model->spec().architecture,
                                model->parameter_count(), trainer.step() > 0 ? "resumes" : "starts",
                                trainer.step()));
    for (const std::string& note : notes) {
        if (!o.quiet) std::fprintf(stderr, "%s\n", note.c_str());
    }
    write_recipe(command, o.train.out / "recipe.json");
    const TrainSummary s = trainer.run(&stop_on_signal());
    const Json result = to_json(s, model->parameter_count());
    if (o.json) {
        print_json(result);
        return;
    }
    for (const auto& [key, value] : result.items()) std::printf("%s %s\n", key.c_str(), value.dump().c_str());
}

void start(CLI::App& command, Options& o) {
    require(!o.out.empty(), "train", "give the folder of the run: --out DIR");
    const fs::path saved = fs::path(o.out) / "recipe.json";
    if (!o.recipe.empty()) {
        apply_recipe(command, o.recipe);
    } else if (o.resume && fs::exists(saved)) {
        apply_recipe(command, saved);
    }
    o.train.out = o.out;
    if (o.train.schedule.floor < 0) o.train.schedule.floor = o.train.schedule.peak / 10;
    o.shape.tie_embeddings = !o.untied;
    run(o, command);
}

void add_model_options(CLI::App& c, Options& o) {
    c.add_option("--arch", o.arch, "Architecture of a new model: mamba, mamba2, falcon_mamba");
    c.add_option("--config", o.config, "config.json of a new model, instead of --arch and its shape");
    c.add_option("--init-from", o.init_from, "Model folder to start from, instead of a new model");
    c.add_option("--d-model", o.shape.e, "Width")->check(kPositive)->capture_default_str();
    c.add_option("--layers", o.shape.layers, "Layers")->check(kPositive)->capture_default_str();
    c.add_option("--d-state", o.shape.n, "State size; 0: the architecture's")->check(kNotNegative);
    c.add_option("--expand", o.shape.expand, "Inner width / width")->check(kPositive);
    c.add_option("--d-conv", o.shape.k, "Convolution width")->check(kPositive);
    c.add_option("--head-dim", o.shape.p, "Head dimension (mamba2); 0: the rule's")->check(kNotNegative);
    c.add_option("--n-groups", o.shape.g, "B/C groups (mamba2)")->check(kPositive);
    c.add_option("--dt-rank", o.shape.dt_rank, "Rank of delta (mamba); 0: the rule's")->check(kNotNegative);
    c.add_flag("--untied", o.untied, "A head of its own, not the embedding's");
}

void add_data_options(CLI::App& c, Options& o) {
    c.add_option("--data", o.data,
                 "Texts: .txt or .jsonl, also .zst; FILE:3 visits a file three times an epoch");
    c.add_option("--valid", o.valid, "Texts to validate on");
    c.add_option("--repeat", o.repeat, "Visits an epoch of files that do not say")->check(kPositive);
    c.add_option("--tokenizer", o.tokenizer,
                 "tokenizer.json; without it bytes are the ids (0..254, 255 ends a document)");
    c.add_option("--separator", o.documents.separator, "Line after each document of a .txt")
        ->capture_default_str();
    c.add_option("--text-field", o.documents.field, "Field of a .jsonl line")->capture_default_str();
    c.add_option("--cache", o.cache, "Folder of the token cache; default OUT/cache");
    c.add_option("--length", o.sampler.length, "Tokens in a window")->check(kPositive)->capture_default_str();
    c.add_option("--batch", o.sampler.batch, "Windows in a batch")->check(kPositive)->capture_default_str();
    c.add_option("--accumulate", o.train.accumulate, "Batches in a step")
        ->check(kPositive)
        ->capture_default_str();
    c.add_flag("--packed", o.sampler.packed,
               "Whole documents, which never see each other, instead of windows");
    c.add_option("--seed", o.sampler.seed, "Of the new model and the order of the data")
        ->capture_default_str();
}

void add_run_options(CLI::App& c, Options& o) {
    TrainOptions& t = o.train;
    c.add_option("--steps", t.steps, "End after so many steps")->check(kNotNegative);
    c.add_option("--tokens", t.tokens, "End after so many tokens")->check(kNotNegative);
    c.add_option("--minutes", t.minutes, "End after so much time (resuming is then not exact)")
        ->check(kNotNegative);
    c.add_option("--lr", t.schedule.peak, "Highest learning rate")->capture_default_str();
    c.add_option("--min-lr", t.schedule.floor, "Last learning rate; default a tenth of --lr")
        ->check(kNotNegative);
    c.add_option("--beta1", t.optimizer.beta1, "AdamW")->check(kBelowOne)->capture_default_str();
    c.add_option("--device", o.device, "Where the model is")
        ->check(CLI::IsMember({"cpu", "cuda"}))
        ->capture_default_str();
    add_recompute(c, o.recompute);
    c.add_flag("--deterministic", o.deterministic,
               "The same bytes from run to run (cuda; on the CPU always)");
    c.add_option("--dtype", o.dtype, "Of matrix products, on a GPU of activations too; weights stay f32")
        ->check(CLI::IsMember({"f32", "bf16"}))
        ->capture_default_str();
    c.add_option("--threads", o.threads, "Threads; 0: all cores")->check(CLI::Range(0, 1024));
    add_loop_options(c, t);
    c.add_option("--valid-every", t.valid_every, "Steps; 0: only at the end")
        ->check(kNotNegative)
        ->capture_default_str();
    c.add_option("--valid-tokens", o.valid_tokens, "At most so many; 0: all")
        ->check(kNotNegative)
        ->capture_default_str();
}

}  // namespace

void add_train(CLI::App& app) {
    auto o = std::make_shared<Options>();
    o->train.schedule = {.peak = 1e-3, .floor = -1, .warmup = 100};
    CLI::App* c = app.add_subcommand("train", "Train a language model on text");
    c->footer(
        "Needed: --out, --data, one of --arch, --config and --init-from, and an end: --steps, --tokens or "
        "--minutes.");
    c->add_option("--out", o->out, "Folder of the run: checkpoints, metrics.jsonl, and the newest model");
    c->add_flag("--resume", o->resume,
                "Continue the run in --out, if there is one, with its options where none are given");
    c->add_option("--recipe", o->recipe, "JSON file {option: value}; the command line wins");
    add_model_options(*c, *o);
    add_data_options(*c, *o);
    add_run_options(*c, *o);
    c->add_flag("--json", o->json, "Print the result as one JSON value");
    c->add_flag("--quiet", o->quiet, "No progress on stderr");
    c->callback([o, c] { start(*c, *o); });
}

}  // namespace ssm::cli
