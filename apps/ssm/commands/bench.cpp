#include "apps/ssm/commands/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/core/machine.h"
#include "ssm/core/replay.h"
#include "ssm/generate/decoder.h"
#include "ssm/io/mapped_file.h"
#include "ssm/models/registry.h"
#include "ssm/ops/linear/linear_rates.h"
#include "ssm/ops/sample/sample.h"
#include "ssm/train/optimizer.h"
#include "ssm/train/trained_language_model.h"

namespace ssm::cli {
namespace {

struct Options {
    RunOptions run;
    StateOptions states;
    std::string model, shape, config;
    int64_t prompt = 512, generate = 128, depth = 0, train_length = 0, train_batch = 4;
    std::string recompute;
    std::vector<int64_t> batches{1};
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

// As a new model's, but a large matrix repeats its first 2^20 numbers: drawing billions takes a minute.
Tensor random_value(const Parameter& p, Random& random, DType matrices) {
    constexpr int64_t kDrawn = int64_t{1} << 20;
    const bool matrix = p.kind == Parameter::Kind::matrix;
    const int64_t size = element_count(p.shape);
    if (!matrix || size <= kDrawn) {
        Tensor value = Tensor::empty(p.shape);
        p.init(random, value);
        return matrix ? value.to(matrices) : value;
    }
    Tensor drawn = Tensor::empty({kDrawn});
    p.init(random, drawn);
    drawn = drawn.to(matrices);
    const Tensor value = Tensor::empty(p.shape, matrices);
    for (size_t at = 0; at < value.bytes(); at += drawn.bytes())
        std::memcpy(value.raw() + at, drawn.raw(), std::min(drawn.bytes(), value.bytes() - at));
    return value;
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
    Random random(0);
    model->visit([&](const std::string&, Parameter& p) { p.var = Var(random_value(p, random, dtype)); });
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
    int64_t steps = 0;  // of decoding
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

// Greedy steps of b sequences that have read `depth` tokens each; the host waits once, at the end.
Test decode_test(const Exec& ex, LanguageModel& model, DType states, int64_t b, int64_t t, int64_t depth) {
    const auto elements = static_cast<double>(model.matrix_elements()), batch = static_cast<double>(b);
    auto decoder = std::make_shared<Decoder>(ex, model, b, states);
    const double step_bytes = elements * static_cast<double>(size_of(model.dtype())) +
                              2.0 * batch * static_cast<double>(decoder->state_bytes_per_slot());
    std::vector<int32_t> slots;
    for (int64_t i = 0; i < b; ++i) {
        slots.push_back(static_cast<int32_t>(i));
        if (depth > 0) decoder->read(i, random_ids(depth, model.vocab()));
    }
    std::string name = b == 1 ? fmt::format("tg{}", t) : fmt::format("tg{}x{}", b, t);
    if (depth > 0) name += fmt::format("@{}", depth);
    return {name,
            b * t,
            {.flop = b > 1 ? 2 * elements * batch * static_cast<double>(t) : 0,
             .bytes = step_bytes * static_cast<double>(t)},
            [decoder, slots, t, first = random_ids(b, model.vocab())] {
                decoder->step(slots, first);
                for (int64_t i = 1; i < t; ++i) decoder->step();
                decoder->next_ids();
            },
            t};
}

// Steps as the trainer's: gradients, norm, AdamW (of rate 0), on a GPU as a graph.
struct TrainingStep {
    TrainingStep(const Exec& ex, LanguageModel& language_model, const TrainedLanguageModel::Options& options)
        : model(ex, language_model, options), optimizer(ex, model.parameters(), {}), replay(ex) {
        optimizer.set_rate(1, 0);
    }
    void run() {
        replay.run({}, [this] {
            model.add_gradients(optimizer.loss());
            optimizer.step();
        });
    }
    TrainedLanguageModel model;
    Optimizer optimizer;
    Replay replay;
};

Test train_test(const Exec& ex, LanguageModel& model, const Options& o) {
    const int64_t b = o.train_batch, l = o.train_length;
    const bool rounded = ex.device != Device::cpu && o.run.type() == DType::bf16;
    auto step = std::make_shared<TrainingStep>(
        ex, model,
        TrainedLanguageModel::Options{.dtype = rounded ? DType::bf16 : DType::f32,
                                      .recompute = recompute_of(o.recompute, ex.device)});
    Batch batch{.ids = random_ids(b * l, model.vocab()),
                .targets = random_ids(b * l, model.vocab()),
                .cu_seqlens = {}};
    for (int64_t i = 0; i <= b; ++i) batch.cu_seqlens.push_back(i * l);
    const double whole = 1;
    step->model.set_batches({&batch, 1}, {&whole, 1});
    step->run();  // the second run is captured, the third is the first that is like those that follow
    step->run();
    return {fmt::format("train{}x{}", b, l),
            b * l,
            {.flop = step->model.flop_per_token() * static_cast<double>(b * l)},
            [step] { step->run(); }};
}

// A GPU's rates do not drift: measured once a run.
struct GpuRates {
    double copy = 0, products = 0;
};

nlohmann::ordered_json measure(const Exec& ex, const Test& test, const Options& o, DType dtype,
                               GpuRates& gpu) {
    const auto run_whole = [&] {
        test.run();
        synchronize(ex);
    };
    run_whole();  // warm: packs weights, fills caches and the allocator
    const size_t memory = ex.allocator->peak_bytes(), reserved = ex.allocator->reserved_bytes();
    const bool bf16_products = dtype == DType::bf16 || ex.matmul == MatmulPrecision::bf16;
    std::vector<double> seconds, bandwidth, rate;
    const auto measure_floor = [&] {
        const DType products = bf16_products ? DType::bf16 : DType::f32;
        const bool bytes = test.work.bytes > 0, flop = test.work.flop > 0;
        if (ex.device == Device::cpu) {
            if (bytes) bandwidth.push_back(measure_read_bandwidth(ex));
            if (flop) rate.push_back(measure_matrix_rate(ex, products));
            return;
        }
        if (bytes && gpu.copy == 0) gpu.copy = measure_copy_bandwidth(ex);
        if (flop && gpu.products == 0) gpu.products = measure_matrix_rate(ex, products);
        if (bytes) bandwidth.assign(1, gpu.copy);
        if (flop) rate.assign(1, gpu.products);
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
        {"peak_gigabytes", static_cast<double>(memory) * 1e-9},
        {"reserved_gigabytes", static_cast<double>(reserved) * 1e-9},
        {"tokens_per_second_best", static_cast<double>(test.tokens) / *std::ranges::min_element(seconds)}};
    if (test.steps > 0) {
        result["state_dtype"] = o.states.dtype;
        result["milliseconds_per_step"] = 1e3 * time / static_cast<double>(test.steps);
    }
    if (floor > 0) result["percent_of_floor"] = 100 * floor / time;
    if (!bandwidth.empty())
        result[ex.device == Device::cpu ? "read_gigabytes_per_second" : "copy_gigabytes_per_second"] =
            median(bandwidth) / 1e9;
    if (!rate.empty()) result["matrix_gigaflop_per_second"] = median(rate) / 1e9;
    return result;
}

void run(const Options& o) {
    Exec ex = o.run.exec();
    const bool training = o.train_length > 0;
    require(training || o.prompt > 0 || o.generate > 0, "bench",
            "nothing to measure: --pp, --tg and --train-length are 0");
    if (training && o.run.type() == DType::bf16) ex.matmul = MatmulPrecision::bf16;
    const auto model = make_model(o);
    model->move_to(ex);
    std::vector<Test> tests;
    if (training) {
        tests.push_back(train_test(ex, *model, o));
    } else {
        if (o.prompt > 0) tests.push_back(prefill_test(ex, *model, o.prompt));
        for (const int64_t b : o.batches)
            if (o.generate > 0)
                tests.push_back(decode_test(ex, *model, o.states.type(), b, o.generate, o.depth));
    }
    GpuRates gpu;
    nlohmann::ordered_json results = nlohmann::ordered_json::array();
    for (const Test& test : tests) {
        results.push_back(measure(ex, test, o, o.run.type(), gpu));
        const auto& r = results.back();
        if (!o.run.json) {
            const std::string step =
                test.steps > 0 ? fmt::format("{:.3f} ms a step   ", r["milliseconds_per_step"].get<double>())
                               : std::string();
            const std::string where =
                ex.device == Device::cpu ? fmt::format("{} threads", ex.threads) : std::string("cuda");
            const std::string type =
                o.run.dtype + (test.steps > 0 && o.states.type() == DType::bf16 ? ", bf16 states" : "");
            std::printf("%-12s %10.1f tokens/s   %s%.1f %% of the floor   (%s, %s, median of %d)\n",
                        test.name.c_str(), r["tokens_per_second"].get<double>(), step.c_str(),
                        r["percent_of_floor"].get<double>(), where.c_str(), type.c_str(), o.repeats);
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
        ->check(kNotNegative)
        ->capture_default_str();
    c->add_option("--tg", o->generate, "Tokens to write one by one; 0: not measured")
        ->check(kNotNegative)
        ->capture_default_str();
    c->add_option("--depth", o->depth, "Tokens that each sequence has read before it is written on")
        ->check(kNotNegative)
        ->capture_default_str();
    c->add_option("--batch", o->batches, "Sequences written at once; several: each is measured")
        ->delimiter(',')
        ->check(CLI::Range(1, 1024))
        ->capture_default_str();
    c->add_option("--train-length", o->train_length,
                  "Measure a training step (gradients and AdamW) of this length")
        ->check(kNotNegative)
        ->capture_default_str();
    c->add_option("--train-batch", o->train_batch, "Sequences in it")
        ->check(kPositive)
        ->capture_default_str();
    add_recompute(*c, o->recompute);
    c->add_option("--repeats", o->repeats, "Measurements; the median counts")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    o->states.add_to(*c);
    o->run.add_to(*c);
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
