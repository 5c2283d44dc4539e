#include "apps/ssm/commands/tokenizer.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "apps/ssm/commands/common.h"
#include "ssm/core/error.h"
#include "ssm/io/atomic_file.h"
#include "ssm/io/tokenizer/bpe_trainer.h"
#include "ssm/io/tokenizer/tokenizer.h"
#include "ssm/train/documents.h"

namespace ssm::cli {
namespace {

struct TrainOptions {
    std::vector<std::string> data, special;
    std::string out, separator = "<|endoftext|>";
    BpeTrainerOptions trainer;
    bool json = false;
};

struct CodeOptions {
    std::string tokenizer, text, file, ids;
    bool has_text = false, special = false, json = false;
};

constexpr size_t kBatch = size_t{64} << 20;  // bytes of documents counted at once

// Folders get a tokenizer.json.
std::filesystem::path output_file(const std::string& out) {
    const std::filesystem::path path(out);
    if (path.extension() == ".json" && !std::filesystem::is_directory(path)) return path;
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) fail(ErrorCode::io, "tokenizer", "{}: {}", out, error.message());
    return path / "tokenizer.json";
}

struct Corpus {
    size_t documents = 0, bytes = 0;
};

Corpus count_pieces(const TrainOptions& options, BpeTrainer& trainer) {
    Corpus corpus;
    std::vector<std::string> batch;
    size_t batch_bytes = 0;
    const auto flush = [&] {
        const std::vector<std::string_view> views(batch.begin(), batch.end());
        trainer.add(views);
        corpus.documents += batch.size();
        corpus.bytes += batch_bytes;
        std::fprintf(stderr, "\rread %zu documents, %.1f MB", corpus.documents,
                     static_cast<double>(corpus.bytes) * 1e-6);
        batch.clear();
        batch_bytes = 0;
    };
    for (const std::string& file : options.data) {
        DocumentReader reader(file, {.separator = options.separator});
        for (std::string document; reader.next(document);) {
            batch_bytes += document.size();
            batch.push_back(std::move(document));
            if (batch_bytes >= kBatch) flush();
        }
    }
    flush();
    std::fputc('\n', stderr);
    require(corpus.bytes > 0, "tokenizer", "the data holds no text");
    return corpus;
}

void run_train(TrainOptions options) {
    options.trainer.special_tokens = {options.separator};
    for (const std::string& token : options.special) options.trainer.special_tokens.push_back(token);
    const auto path = output_file(options.out);
    AtomicFile file(path);  // first of all: what cannot be written is not worth the work
    BpeTrainer trainer(options.trainer);
    const Corpus corpus = count_pieces(options, trainer);
    int64_t tokens = 0;
    const std::string json = trainer.train([&](int64_t n) {
        tokens = n;
        std::fprintf(stderr, "\r%lld of %lld tokens", static_cast<long long>(n),
                     static_cast<long long>(options.trainer.vocab_size));
    });
    std::fputc('\n', stderr);
    if (tokens < options.trainer.vocab_size)
        std::fprintf(stderr, "no further pair occurs %lld times: the vocabulary is smaller than asked for\n",
                     static_cast<long long>(options.trainer.min_frequency));
    file.write(json);
    file.commit();
    if (options.json) {
        print_json({{"file", path.string()},
                    {"vocab_size", tokens},
                    {"documents", corpus.documents},
                    {"bytes", corpus.bytes}});
    } else {
        std::printf("%s\n", path.c_str());
    }
}

void run_encode(const CodeOptions& options) {
    const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    const std::string text = options.has_text ? options.text : read_text(options.file);
    const std::vector<int32_t> ids = tokenizer.encode(text, options.special);
    if (options.json) {
        nlohmann::ordered_json tokens = nlohmann::ordered_json::array();
        for (const int32_t id : ids) tokens.push_back(tokenizer.token(id));
        print_json({{"ids", ids}, {"tokens", tokens}});
        return;
    }
    std::string line;
    for (const int32_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
    std::printf("%s\n", line.c_str());
}

void run_decode(const CodeOptions& options) {
    const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    const std::vector<int32_t> ids = parse_ids(options.ids);
    const std::string text = tokenizer.decode(ids, !options.special);
    if (options.json) {
        print_json({{"text", text}});
        return;
    }
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fputc('\n', stdout);
}

void add_train_command(CLI::App& parent) {
    auto* command = parent.add_subcommand("train", "Train a byte-level BPE and write a tokenizer.json");
    const auto o = std::make_shared<TrainOptions>();
    command->add_option("--data", o->data, "Text: .txt or .jsonl, each optionally .zst")->required();
    command->add_option("--vocab-size", o->trainer.vocab_size, "Tokens, special ones and 256 bytes included")
        ->capture_default_str();
    command->add_option("--out", o->out, "File NAME.json, or folder for tokenizer.json")->required();
    command->add_option("--special", o->special, "Further special tokens");
    command
        ->add_option("--separator", o->separator, "Line between documents of .txt; becomes special token 0")
        ->capture_default_str();
    command->add_option("--min-frequency", o->trainer.min_frequency, "Rarer pairs are not merged")
        ->capture_default_str();
    command->add_option("--pattern", o->trainer.pattern,
                        "Regular expression of the pieces; default: GPT-2's");
    command->add_option("--threads", o->trainer.threads, "Threads; 0: all cores")
        ->check(CLI::Range(0, 1024))
        ->capture_default_str();
    command->add_flag("--json", o->json, "Print the result as one JSON object");
    command->callback([o] { run_train(*o); });
}

void add_encode_command(CLI::App& parent) {
    auto* command = parent.add_subcommand("encode", "Print the ids of a text");
    const auto o = std::make_shared<CodeOptions>();
    command->add_option("--tokenizer", o->tokenizer, "tokenizer.json or a folder with one")->required();
    auto* source = command->add_option_group("text");
    auto* text = source->add_option("--text", o->text, "The text");
    source->add_option("--file", o->file, "A file with the text, also .zst; -: standard input");
    source->require_option(1);
    command->add_flag("--special", o->special, "Add the tokens of the post-processor, such as <s>");
    command->add_flag("--json", o->json, "Print one JSON object with ids and tokens");
    command->callback([o, text] {
        o->has_text = text->count() > 0;
        run_encode(*o);
    });
}

void add_decode_command(CLI::App& parent) {
    auto* command = parent.add_subcommand("decode", "Print the text of ids");
    const auto o = std::make_shared<CodeOptions>();
    command->add_option("--tokenizer", o->tokenizer, "tokenizer.json or a folder with one")->required();
    command->add_option("--ids", o->ids, "\"1 2 3\"")->required();
    command->add_flag("--special", o->special, "Show special tokens");
    command->add_flag("--json", o->json, "Print one JSON object with the text");
    command->callback([o] { run_decode(*o); });
}

}  // namespace

void add_tokenizer(CLI::App& app) {
    auto* command = app.add_subcommand("tokenizer", "Train a tokenizer, encode, decode");
    command->require_subcommand(1);
    add_train_command(*command);
    add_encode_command(*command);
    add_decode_command(*command);
}

}  // namespace ssm::cli
