#include "apps/ssm/commands/convert.h"

#include <cstdio>
#include <filesystem>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/mapped_file.h"
#include "ssm/models/registry.h"

namespace ssm::cli {
namespace {

struct Options {
    std::string dir, out, dtype = "f32", layout = "hf";
    size_t max_shard_bytes = size_t{5'000'000'000};
};

void run(const Options& o) {
    namespace fs = std::filesystem;
    const DType dtype = o.dtype == "bf16" ? DType::bf16 : DType::f32;
    std::error_code ignored;
    require(!fs::equivalent(o.dir, o.out, ignored), "convert",
            "--out is the model folder itself; give another, so that nothing is lost");
    const auto model = load_model(o.dir, dtype);
    const Layout layout = o.layout == "mamba_ssm" ? Layout::mamba_ssm : Layout::hugging_face;
    save_model(*model, o.out, {.dtype = dtype, .max_shard_bytes = o.max_shard_bytes, .layout = layout});
    for (const char* name : {"tokenizer.json", "generation_config.json"}) {
        const fs::path from = fs::path(o.dir) / name;
        if (fs::exists(from, ignored)) write_file_atomic(fs::path(o.out) / name, read_text_file(from));
    }
    std::fprintf(stderr, "%s: %lld parameters as %s\n", o.out.c_str(),
                 static_cast<long long>(model->parameter_count()), o.dtype.c_str());
}

}  // namespace

void add_convert(CLI::App& app) {
    auto o = std::make_shared<Options>();
    CLI::App* c = app.add_subcommand("convert", "Write a model folder in another layout, type or shard size");
    c->add_option("dir", o->dir, "Model folder")->required();
    c->add_option("--out", o->out, "Folder to write")->required();
    c->add_option("--layout", o->layout, "hf: transformers'; mamba_ssm: the original package's")
        ->check(CLI::IsMember({"hf", "mamba_ssm"}))
        ->capture_default_str();
    c->add_option("--dtype", o->dtype, "Of the matrices")
        ->check(CLI::IsMember({"f32", "bf16"}))
        ->capture_default_str();
    c->add_option("--max-shard-bytes", o->max_shard_bytes, "Largest file of tensors")
        ->check(kPositive)
        ->capture_default_str();
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
