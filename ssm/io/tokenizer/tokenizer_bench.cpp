// Encoding and decoding of English text: the shipped vocabulary on this project's own documents, and, where
// the shared folder is present, published vocabularies. Floor: none is known; the rate of reading a file is 1
// GB/s or more, so the tokenizer is what a corpus waits for.
#include "ssm/io/tokenizer/tokenizer.h"

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "tests/support/shared.h"

namespace ssm {
namespace {

// Some twenty kilobytes of text, cut into documents at blank lines as a corpus is.
std::vector<std::string> documents() {
    std::vector<std::string> all(1);
    for (const char* name : {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ssm/io/tokenizer/README.md",
                             "ssm/ops/ssd/README.md", "models/stories/README.md"}) {
        std::ifstream file(test::source_dir() / name);
        for (std::string line; std::getline(file, line);) {
            all.back() += line + "\n";
            if (line.empty()) all.emplace_back();
        }
    }
    return all;
}

void encode(benchmark::State& state, const Tokenizer& tokenizer) {
    const std::vector<std::string> texts = documents();
    int64_t bytes = 0, tokens = 0;
    for (auto _ : state) {
        for (const std::string& text : texts) {
            tokens += static_cast<int64_t>(tokenizer.encode(text).size());
            bytes += static_cast<int64_t>(text.size());
        }
    }
    state.SetBytesProcessed(bytes);
    state.SetItemsProcessed(tokens);
}

void decode(benchmark::State& state, const Tokenizer& tokenizer) {
    std::vector<std::vector<int32_t>> ids;
    for (const std::string& text : documents()) ids.push_back(tokenizer.encode(text));
    int64_t bytes = 0, tokens = 0;
    for (auto _ : state) {
        for (const auto& document : ids) {
            bytes += static_cast<int64_t>(tokenizer.decode(document).size());
            tokens += static_cast<int64_t>(document.size());
        }
    }
    state.SetBytesProcessed(bytes);
    state.SetItemsProcessed(tokens);
}

// A benchmark does not time a wrong answer: text must come back as it went in.
void require_round_trip(const Tokenizer& tokenizer, const std::string& name) {
    for (const std::string& text : documents()) {
        if (tokenizer.decode(tokenizer.encode(text)) == text) continue;
        std::fprintf(stderr, "%s: the text does not come back: %s\n", name.c_str(), text.c_str());
        std::exit(1);
    }
}

void add(const std::string& name, const std::filesystem::path& path) {
    if (!std::filesystem::exists(path)) return;
    static std::vector<std::unique_ptr<Tokenizer>> kept;
    kept.push_back(std::make_unique<Tokenizer>(Tokenizer::load(path)));
    const Tokenizer& tokenizer = *kept.back();
    require_round_trip(tokenizer, name);
    benchmark::RegisterBenchmark(("encode/" + name).c_str(), [&](auto& state) { encode(state, tokenizer); });
    benchmark::RegisterBenchmark(("decode/" + name).c_str(), [&](auto& state) { decode(state, tokenizer); });
}

const bool added = [] {
    add("stories", test::source_dir() / "models/stories/tokenizer.json");
    for (const char* name : {"gpt-neox-20b", "gpt2", "qwen3", "mistral-v1"})
        add(name, test::shared_dir() / "tokenizers" / name / "tokenizer.json.zst");
    return true;
}();

}  // namespace
}  // namespace ssm
