#include "apps/ssm/commands/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/core/machine.h"
#include "ssm/io/mapped_file.h"
#include "ssm/models/registry.h"
#include "ssm/ops/linear/linear_rates.h"
#include "ssm/ops/sample/sample.h"

namespace ssm::cli {
namespace {

struct Options {
    RunOptions run;
    std::string model, shape, config;
    int64_t prompt = 512, generate = 128, train_length = 0, train_batch = 4;
    int repeats = 5;
};

// The published models.
struct NamedShape {
    const char* name;
    const char* architecture;
    int64_t e, layers, vocab;
};
constexpr NamedShape kShapes[] = {
    {"mamba-130m", "mamba", 768, 24, 50280},    {"mamba-370m", "mamba", 1024, 48, 50280},
    {"mamba-790m", "mamba", 1536, 48, 50280},   {"mamba-1.4b", "mamba", 2048, 48, 50280},
    {"mamba-2.8b", "mamba", 2560, 64, 50280},   {"mamba2-130m", "mamba2", 768, 24, 50288},
    {"mamba2-370m", "mamba2", 1024, 48, 50288}, {"mamba2-780m", "mamba2", 1536, 48, 50288},
    {"mamba2-1.3b", "mamba2", 2048, 48, 50288}, {"mamba2-2.7b", "mamba2", 2560, 64, 50288},
};

std::vector<std::string> shape_names() {
    std::vector<std::string> names;
    for (const NamedShape& s : kShapes) names.emplace_back(s.name);
    return names;
}

// A model folder's, or random but sane parameters in a named shape or a config's.
std::unique_ptr<LanguageModel> make_model(const Options& o) {
    require((!o.model.empty()) + (!o.shape.empty()) + (!o.config.empty()) <= 1, "bench",
            "give one of --model, --shape and --config");
    const DType dtype = o.train_length > 0 ? DType::f32 : o.run.type();
    if (o.shape.empty() && o.config.empty()) {
        return load_model(o.model.empty() ? shipped_model() : std::filesystem::path(o.model), dtype);
    }
    std::string text;
    if (!o.config.empty()) text = read_text_file(o.config);
    for (const NamedShape& s : kShapes) {
        if (o.shape != s.name) continue;
        text = find_architecture(s.architecture).new_config({.vocab = s.vocab, .e = s.e, .layers = s.layers});
    }
    auto model = build_model(text, "config");
    model->initialise(0);
    model->visit([&](const std::string&, Parameter& p) {
        if (p.kind == Parameter::Kind::matrix) p.var = Var(p.value().to(dtype));
    });
    return model;
}

double seconds_of(const std::function<void()>& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Work {
    double flop = 0, bytes = 0;  // of one repeat
};

struct Test {
    std::string name;
    int64_t tokens;
    Work work;  // floor = max(flop / rate, bytes / bandwidth)
    std::function<void()> run;
};

std::vector<int32_t> random_ids(int64_t count, int64_t vocab) {
    Random random(1);
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(random.next() % static_cast<uint64_t>(vocab));
    return ids;
}

// A session is made once and cleared for each repeat: its pages are not faulted in again.
void clear(ModelState& state) {
    state.visit([](const std::string&, Tensor& t) { t.fill_zero(); });
}

Test prefill_test(const Exec& ex, LanguageModel& model, int64_t t) {
    const auto elements = static_cast<double>(model.matrix_elements(false));
    const auto head = static_cast<double>(model.matrix_elements()) - elements;
    return {fmt::format("pp{}", t),
            t,
            {.flop = 2 * elements * static_cast<double>(t) + 2 * head},
            [&ex, &model, ids = random_ids(t, model.vocab()),
             state = std::make_shared<ModelState>(model.new_state(1))] {
                clear(*state);
                const auto count = static_cast<int64_t>(ids.size());
                const int64_t cu_seqlens[] = {0, count};
                Ctx ctx{.exec = ex, .activation = model.dtype()};
                if (count > 1) ctx.cu_seqlens = cu_seqlens;
                const Var hidden = model.hidden(ctx, {ids.data(), {count}}, state.get());
                model.logits(ctx, hidden.value().rows(count - 1, count));
            }};
}

Test decode_test(const Exec& ex, LanguageModel& model, int64_t t) {
    const auto item = static_cast<double>(size_of(model.dtype()));
    const double step_bytes = static_cast<double>(model.matrix_elements()) * item +
                              2.0 * static_cast<double>(model.new_state(1).bytes());
    return {fmt::format("tg{}", t),
            t,
            {.bytes = step_bytes * static_cast<double>(t)},
            [&ex, &model, t, state = std::make_shared<ModelState>(model.new_state(1))] {
                clear(*state);
                int32_t id = 0;
                for (int64_t i = 0; i < t; ++i) {
                    Ctx ctx{.exec = ex, .activation = model.dtype()};
                    const Var hidden = model.hidden(ctx, {&id, {1}}, state.get());
                    const Tensor logits = model.logits(ctx, hidden.value()).to_host();
                    id = argmax({logits.data<const float>(), static_cast<size_t>(model.vocab())});
                }
            }};
}

Test train_test(const Exec& ex, LanguageModel& model, int64_t b, int64_t l) {
    model.require_grad();
    std::vector<int64_t> cu_seqlens;
    for (int64_t i = 0; i <= b; ++i) cu_seqlens.push_back(i * l);
    return {fmt::format("train{}x{}", b, l),
            b * l,
            {.flop = 6 * static_cast<double>(model.matrix_elements()) * static_cast<double>(b * l)},
            [&ex, &model, cu_seqlens, ids = random_ids(b * l, model.vocab())] {
                const auto t = static_cast<int64_t>(ids.size());
                Tape tape;
                Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = cu_seqlens};
                model.loss(ctx, {ids.data(), {t}}, {ids.data(), {t}});
                tape.backward();
                model.visit([](const std::string&, Parameter& p) { p.var.clear_grad(); });
            }};
}

nlohmann::ordered_json measure(const Exec& ex, const Test& test, const Options& o, DType dtype) {
    const auto run_whole = [&] {
        test.run();
        synchronize(ex);
    };
    run_whole();  // warm: packs weights, fills caches and the allocator
    const bool bf16_products = dtype == DType::bf16 || ex.matmul == MatmulPrecision::bf16;
    std::vector<double> seconds, bandwidth, rate;
    const auto measure_floor = [&] {
        if (ex.device != Device::cpu) return;  // the rates of a GPU are not measured yet
        if (test.work.bytes > 0) bandwidth.push_back(measure_read_bandwidth(ex));
        if (test.work.flop > 0)
            rate.push_back(measure_matrix_rate(ex, bf16_products ? DType::bf16 : DType::f32));
    };
    for (int i = 0; i < o.repeats; ++i) {
        if (i % 2 == 0) measure_floor();  // in the same minute: shared machines drift
        seconds.push_back(seconds_of(run_whole));
    }
    const auto median = [](std::vector<double> v) {
        if (v.empty()) return 0.0;
        std::sort(v.begin(), v.end());
        return (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
    };
    const double time = median(seconds);
    double floor = 0;
    if (!bandwidth.empty()) floor = std::max(floor, test.work.bytes / median(bandwidth));
    if (!rate.empty()) floor = std::max(floor, test.work.flop / median(rate));
    nlohmann::ordered_json result = {
        {"test", test.name},
        {"tokens_per_second", static_cast<double>(test.tokens) / time},
        {"repeats", o.repeats},
        {"threads", ex.threads},
        {"dtype", name_of(dtype)},
        {"tokens_per_second_best", static_cast<double>(test.tokens) / *std::ranges::min_element(seconds)}};
    if (floor > 0) result["percent_of_floor"] = 100 * floor / time;
    if (!bandwidth.empty()) result["read_gigabytes_per_second"] = median(bandwidth) / 1e9;
    if (!rate.empty()) result["matrix_gigaflop_per_second"] = median(rate) / 1e9;
    return result;
}

void run(const Options& o) {
    Exec ex = o.run.exec();
    const bool training = o.train_length > 0;
    if (training && o.run.type() == DType::bf16) ex.matmul = MatmulPrecision::bf16;
    const auto model = make_model(o);
    model->move_to(ex);
    std::vector<Test> tests;
    if (training) {
        tests.push_back(train_test(ex, *model, o.train_batch, o.train_length));
    } else {
        if (o.prompt > 0) tests.push_back(prefill_test(ex, *model, o.prompt));
        if (o.generate > 0) tests.push_back(decode_test(ex, *model, o.generate));
    }
    nlohmann::ordered_json results = nlohmann::ordered_json::array();
    for (const Test& test : tests) {
        results.push_back(measure(ex, test, o, o.run.type()));
        const auto& r = results.back();
        if (!o.run.json) {
            const std::string share =
                r.contains("percent_of_floor")
                    ? fmt::format("{:.1f} % of the floor", r["percent_of_floor"].get<double>())
                    : std::string("cuda");
            std::printf("%-12s %10.1f tokens/s   %s   (%d threads, %s, median of %d)\n", test.name.c_str(),
                        r["tokens_per_second"].get<double>(), share.c_str(), ex.threads, o.run.dtype.c_str(),
                        o.repeats);
            std::fflush(stdout);
        }
    }
    if (o.run.json) print_json(results);
}

}  // namespace

void add_bench(CLI::App& app) {
    auto o = std::make_shared<Options>();
    CLI::App* c =
        app.add_subcommand("bench", "Speed of reading, writing and training, and how far from the floor");
    c->add_option("--model", o->model, "Model folder; without it, --shape or --config the shipped model");
    c->add_option("--shape", o->shape, "A published model's shape, with random weights")
        ->check(CLI::IsMember(shape_names()));
    c->add_option("--config", o->config, "A config.json, with random weights");
    c->add_option("--pp", o->prompt, "Tokens to read at once; 0: not measured")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--tg", o->generate, "Tokens to write one by one; 0: not measured")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--train-length", o->train_length,
                  "Measure a training step (forward and backward) of this length")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--train-batch", o->train_batch, "Sequences in it")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    c->add_option("--repeats", o->repeats, "Measurements; the median counts")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    o->run.add_to(*c);
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
