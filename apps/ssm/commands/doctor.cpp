#include "apps/ssm/commands/doctor.h"

#include <cmath>
#include <cstdio>
#include <memory>

#include "apps/ssm/commands/common.h"
#include "ssm/autograd/derivatives.h"
#include "ssm/core/machine.h"
#include "ssm/core/random.h"
#include "ssm/ops/adamw/adamw.h"
#include "ssm/ops/linear/linear_rates.h"

namespace ssm::cli {
namespace {

constexpr double kTolerance = 1e-4;
constexpr int64_t kTokens = 37;

// An operator on random inputs, with its gradients.
struct Check {
    std::string name;
    std::vector<Shape> inputs;
    std::function<Var(Ctx&, const std::vector<Var>&)> f;
};

std::vector<int32_t> some_ids(int64_t count, int64_t vocab) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(i * 7 % vocab));
    return ids;
}

std::vector<Check> norms_and_products() {
    const RmsNormOptions gated{.groups = 2, .gate = RmsNormOptions::Gate::before};
    const auto f32 = DType::f32;
    return {
        {"embedding",
         {{11, 24}},
         [](Ctx& c, const auto& v) {
             const auto ids = some_ids(kTokens, 11);
             return embedding(c, on_device_of(c.exec, View<const int32_t, 1>(ids.data(), {kTokens})), v[0]);
         }},
        {"linear",
         {{kTokens, 24}, {40, 24}, {40}},
         [](Ctx& c, const auto& v) { return linear(c, v[0], v[1], v[2]); }},
        {"rms_norm",
         {{kTokens, 24}, {24}},
         [=](Ctx& c, const auto& v) { return rms_norm(c, v[0], v[1], Var(), {}, f32); }},
        {"rms_norm, gated",
         {{kTokens, 24}, {24}, {kTokens, 24}},
         [=](Ctx& c, const auto& v) { return rms_norm(c, v[0], v[1], v[2], gated, f32); }},
        {"add_rms_norm",
         {{kTokens, 24}, {kTokens, 24}, {24}},
         [=](Ctx& c, const auto& v) { return add_rms_norm(c, v[0], v[1], v[2], {}, f32).y; }},
        {"cross_entropy",
         {{kTokens, 24}, {40, 24}},
         [](Ctx& c, const auto& v) {
             const auto ids = some_ids(kTokens, 40);
             const std::vector<float> weights(kTokens, 1.0f / kTokens);
             return linear_cross_entropy(c, v[0], v[1],
                                         on_device_of(c.exec, View<const int32_t, 1>(ids.data(), {kTokens})),
                                         Tensor::from_floats({kTokens}, weights).to(c.exec));
         }},
        {"elementwise",
         {{kTokens, 24}, {kTokens, 24}},
         [](Ctx& c, const auto& v) {
             return multiply(c, add(c, silu(c, v[0]), softplus(c, v[1])), neg_exp(c, v[0]));
         }},
    };
}

std::vector<Check> recurrences() {
    return {
        {"causal_conv1d",
         {{kTokens, 24}, {24, 1, 4}, {24}},
         [](Ctx& c, const auto& v) { return causal_conv1d(c, v[0], v[1], v[2], Activation::silu, nullptr); }},
        {"selective_scan",
         {{kTokens, 24}, {kTokens, 24}, {24, 16}, {kTokens, 16}, {kTokens, 16}, {24}, {kTokens, 24}, {24}},
         [](Ctx& c, const auto& v) {
             return selective_scan(c, {v[0], v[1], neg_exp(c, v[2]), v[3], v[4], v[5], v[6], v[7]}, nullptr);
         }},
        {"ssd",
         {{kTokens, 64}, {kTokens, 4}, {4}, {kTokens, 32}, {kTokens, 32}, {4}, {4}},
         [](Ctx& c, const auto& v) {
             return ssd(c, {v[0], v[1], neg_exp(c, v[2]), v[3], v[4], v[5], v[6]},
                        {.h = 4, .p = 16, .g = 2, .n = 16}, nullptr);
         }},
    };
}

Tensor random_tensor(Random& random, const Shape& shape) {
    const Tensor t = Tensor::empty(shape);
    for (int64_t i = 0; i < t.size(); ++i)
        t.data<float>()[i] = static_cast<float>(random.next() >> 40) * 0x1p-23f - 1.0f;
    return t;
}

// The result and the gradient of every input, one after another.
std::vector<float> values_of(const Check& check, const Exec& ex) {
    Random random(1);
    std::vector<Var> inputs;
    for (const Shape& shape : check.inputs) inputs.emplace_back(random_tensor(random, shape).to(ex), true);
    const int64_t cu_seqlens[] = {0, 5, kTokens};
    Tape tape;
    Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = cu_seqlens};
    const Var y = check.f(ctx, inputs);
    const Tensor result = y.value();  // the backward pass lets go of it
    if (result.size() > 1) y.set_grad(random_tensor(random, result.shape()).to(ex));
    tape.backward();
    std::vector<float> all;
    const auto append = [&](const Tensor& t) {
        const Tensor host = t.to_host();
        all.insert(all.end(), host.data<float>(), host.data<float>() + host.size());
    };
    append(result);
    for (const Var& v : inputs) append(v.grad(ex));
    return all;
}

// Two steps of the optimiser.
std::vector<float> adamw_values(const Exec& ex) {
    Random random(2);
    Tensor t[4];
    for (Tensor& x : t) x = random_tensor(random, {1001}).to(ex);
    t[2].fill_zero();
    t[3].fill_zero();
    const AdamWTable table(ex, {{t[0].view<float, 1>(),
                                 t[1].view<float, 1>(),
                                 t[2].view<float, 1>(),
                                 t[3].view<float, 1>(),
                                 {},
                                 0.1f}});
    const Tensor gradient = t[1].clone(), norm = Tensor::empty(ex, {1});
    const AdamWOptions options{.clip = 1.0f};
    for (int step = 1; step <= 2; ++step) {
        t[1].copy_from(gradient);
        gradient_norm(ex, table, norm.view<float, 1>());
        const Tensor rates =
            Tensor::from_floats({3}, {1e-3f, 1.0f - std::pow(options.beta1, static_cast<float>(step)),
                                      1.0f - std::pow(options.beta2, static_cast<float>(step))})
                .to(ex);
        adamw_step(ex, table, options, rates.view<const float, 1>(), norm.view<const float, 1>());
    }
    const Tensor host = t[0].to_host();
    std::vector<float> all(host.data<float>(), host.data<float>() + host.size());
    all.push_back(norm.item());
    return all;
}

double relative_l2(const std::vector<float>& actual, const std::vector<float>& expected) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double d = static_cast<double>(actual[i]) - static_cast<double>(expected[i]);
        if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
        difference += d * d;
        norm += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
    }
    return std::sqrt(difference / norm);
}

nlohmann::ordered_json check_operators(const Exec& here, const Exec& there) {
    auto checks = norms_and_products();
    for (Check& c : recurrences()) checks.push_back(std::move(c));
    nlohmann::ordered_json all = nlohmann::ordered_json::array();
    const auto add = [&](const std::string& name, const auto& values) {
        const double error = relative_l2(values(there), values(here));
        all.push_back({{"operator", name}, {"error", error}, {"ok", error <= kTolerance}});
    };
    for (const Check& c : checks) add(c.name, [&](const Exec& ex) { return values_of(c, ex); });
    add("adamw", adamw_values);
    return all;
}

void print(const nlohmann::ordered_json& r) {
    const auto& cpu = r["cpu"];
    std::printf("CPU   %d threads, %s; reads %.1f GB/s, %.0f GFLOP/s in f32, %.0f in bf16\n",
                cpu["threads"].get<int>(), cpu["instructions"].get<std::string>().c_str(),
                cpu["read_gigabytes_per_second"].get<double>(), cpu["f32_gigaflop_per_second"].get<double>(),
                cpu["bf16_gigaflop_per_second"].get<double>());
    if (r["gpus"].empty()) std::printf("GPU   none: %s\n", r["no_gpu"].get<std::string>().c_str());
    for (const auto& g : r["gpus"])
        std::printf("GPU   %s, compute capability %s, %d multiprocessors, %.1f GB\n",
                    g["name"].get<std::string>().c_str(), g["compute_capability"].get<std::string>().c_str(),
                    g["multiprocessors"].get<int>(), g["memory_gigabytes"].get<double>());
    for (const auto& c : r["checks"])
        std::printf("%-6s%-18s against %s, with its gradients: relative error %.1e\n",
                    c["ok"].get<bool>() ? "ok" : "WRONG", c["operator"].get<std::string>().c_str(),
                    r["gpus"].empty() ? "one thread" : "the CPU", c["error"].get<double>());
}

void run(const RunOptions& o) {
    const Exec here = make_cpu_exec(o.threads);
    const MachineRates rates = measure_machine(here);
    std::string why;
    const std::vector<Gpu> gpus = list_gpus(why);
    nlohmann::ordered_json r = {{"cpu",
                                 {{"threads", here.threads},
                                  {"instructions", instruction_set()},
                                  {"read_gigabytes_per_second", rates.read_bytes_per_second * 1e-9},
                                  {"f32_gigaflop_per_second", rates.f32_flop_per_second * 1e-9},
                                  {"bf16_gigaflop_per_second", rates.bf16_flop_per_second * 1e-9}}},
                                {"gpus", nlohmann::ordered_json::array()},
                                {"checks", nlohmann::ordered_json::array()}};
    for (const Gpu& g : gpus)
        r["gpus"].push_back({{"name", g.name},
                             {"compute_capability", fmt::format("{}.{}", g.major, g.minor)},
                             {"multiprocessors", g.multiprocessors},
                             {"memory_gigabytes", static_cast<double>(g.memory_bytes) * 1e-9}});
    if (gpus.empty()) {
        r["no_gpu"] = why;
        r["checks"] = check_operators(make_cpu_exec(1), here);
    } else {
        r["checks"] = check_operators(here, make_cuda_exec());
    }
    o.json ? print_json(r) : print(r);
    for (const auto& c : r["checks"])
        if (!c["ok"].get<bool>())
            fail(ErrorCode::numeric, "doctor", "{} does not compute on {} what it does on {}",
                 c["operator"].get<std::string>(), gpus.empty() ? "several threads" : "the GPU",
                 gpus.empty() ? "one" : "the CPU");
}

}  // namespace

void add_doctor(CLI::App& app) {
    auto o = std::make_shared<RunOptions>();
    CLI::App* c =
        app.add_subcommand("doctor", "What this machine offers; each operator on the GPU against the CPU");
    c->add_option("--threads", o->threads, "Threads; 0: all cores")->check(CLI::Range(0, 1024));
    c->add_flag("--json", o->json, "Print the result as one JSON value");
    c->callback([o] { run(*o); });
}

}  // namespace ssm::cli
