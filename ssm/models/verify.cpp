#include "ssm/models/verify.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "ssm/io/safetensors/safetensors.h"
#include "ssm/models/registry.h"
#include "ssm/ops/sample/sample.h"

namespace ssm {
namespace {

constexpr std::string_view kGradient = "grad.";

// ||actual - expected|| / ||expected|| over dense f32 tensors; infinite where one is not finite.
double relative_l2(const Tensor& there, const Tensor& expected) {
    const Tensor actual = there.to_host();
    const auto *a = actual.data<const float>(), *b = expected.data<const float>();
    double difference = 0, norm = 0;
    for (int64_t i = 0, n = expected.size(); i < n; ++i) {
        const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
        difference += d * d;
        norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
    }
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// [rows, columns] of ids as int32.
std::vector<int32_t> read_id_matrix(const SafetensorsFile& file, const std::string& name, int64_t& rows,
                                    int64_t& columns) {
    const Tensor t = file.tensor(name);
    if (t.dtype() != DType::i64 || t.rank() != 2 || t.size() == 0) {
        fail(ErrorCode::bad_file, "verify", "{}: '{}' must be an i64 matrix", file.name(), name);
    }
    rows = t.dim(0);
    columns = t.dim(1);
    const auto* p = t.data<const int64_t>();
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < t.size(); ++i) {
        if (p[i] < 0 || p[i] > std::numeric_limits<int32_t>::max()) {
            fail(ErrorCode::bad_file, "verify", "{}: '{}' holds the id {}", file.name(), name, p[i]);
        }
        ids.push_back(static_cast<int32_t>(p[i]));
    }
    return ids;
}

Tensor expected_tensor(const SafetensorsFile& file, const std::string& name, const Shape& shape) {
    const Tensor t = file.tensor(name, shape);
    return t.to(DType::f32);
}

// ids of greedy decoding from `prompt`, one step at a time.
std::vector<int32_t> greedy_continuation(const Exec& ex, LanguageModel& model,
                                         std::span<const int32_t> prompt, int64_t count) {
    ModelState state = model.new_state(1);
    std::vector<int32_t> ids;
    std::vector<int32_t> feed(prompt.begin(), prompt.end());
    while (static_cast<int64_t>(ids.size()) < count) {
        const auto t = static_cast<int64_t>(feed.size());
        const int64_t cu_seqlens[] = {0, t};
        Ctx ctx{.exec = ex, .activation = model.dtype()};
        if (t > 1) ctx.cu_seqlens = cu_seqlens;
        const Var hidden = model.hidden(ctx, {feed.data(), {t}}, &state);
        const Tensor logits = model.logits(ctx, hidden.value().rows(t - 1, t)).to_host();
        ids.push_back(argmax({logits.data<const float>(), static_cast<size_t>(model.vocab())}));
        feed.assign(1, ids.back());
    }
    return ids;
}

void verify_greedy(const Exec& ex, LanguageModel& model, const SafetensorsFile& expected,
                   const std::vector<int32_t>& input_ids, int64_t l, Verified& out) {
    int64_t rows = 0, columns = 0;
    const auto greedy = read_id_matrix(expected, "greedy", rows, columns);
    int64_t p = 0;
    while (p < std::min(l, columns) && greedy[static_cast<size_t>(p)] == input_ids[static_cast<size_t>(p)])
        ++p;
    if (rows != 1 || p == 0 || p == columns) {
        fail(ErrorCode::bad_file, "verify", "{}: 'greedy' must be [1, P+G] and begin like 'input_ids'",
             expected.name());
    }
    const auto ids = greedy_continuation(ex, model, {greedy.data(), static_cast<size_t>(p)}, columns - p);
    double differing = 0;
    for (size_t i = 0; i < ids.size(); ++i) differing += ids[i] != greedy[static_cast<size_t>(p) + i];
    out.quantities.push_back({"greedy", differing, 0});
}

// Loss and gradients of the mean next-token cross-entropy over sequences of length l; the model then has
// them.
Tensor loss_and_gradients(const Exec& ex, LanguageModel& model, const std::vector<int32_t>& input_ids,
                          std::span<const int64_t> cu_seqlens, int64_t l) {
    // Targets: the next id; none at a sequence's end.
    std::vector<int32_t> targets(input_ids.size(), -1);
    for (size_t i = 0; i + 1 < input_ids.size(); ++i) {
        if ((static_cast<int64_t>(i) + 1) % l != 0) targets[i] = input_ids[i + 1];
    }
    model.require_grad();
    Tape tape;
    Ctx ctx{.exec = ex, .tape = &tape, .cu_seqlens = cu_seqlens};
    const auto t = static_cast<int64_t>(input_ids.size());
    const Var loss = model.loss(ctx, {input_ids.data(), {t}}, {targets.data(), {t}});
    tape.backward();
    return loss.value();
}

void verify_gradients(const Exec& ex, LanguageModel& model, const SafetensorsFile& expected,
                      const std::vector<int32_t>& input_ids, std::span<const int64_t> cu_seqlens, int64_t l,
                      const VerifyOptions& options, Verified& out) {
    const Tensor loss = loss_and_gradients(ex, model, input_ids, cu_seqlens, l);
    out.quantities.push_back({"loss", relative_l2(loss, expected_tensor(expected, "loss", {}).reshape({1})),
                              options.logits_tolerance});
    std::set<std::string, std::less<>> compared;
    model.visit([&](const std::string& name, Parameter& p) {
        const std::string key = std::string(kGradient) + name;
        if (!expected.contains(key))
            fail(ErrorCode::bad_file, "verify", "{} lacks '{}'", expected.name(), key);
        out.quantities.push_back({key, relative_l2(p.var.grad(ex), expected_tensor(expected, key, p.shape)),
                                  options.gradient_tolerance});
        compared.insert(key);
    });
    for (const TensorInfo& info : expected.tensors()) {
        if (info.name.starts_with(kGradient) && !compared.contains(info.name)) {
            fail(ErrorCode::bad_file, "verify", "{}: '{}' is of no parameter of the model", expected.name(),
                 info.name);
        }
    }
}

}  // namespace

bool Verified::ok() const {
    return std::ranges::all_of(quantities, [](const Quantity& q) { return q.ok(); });
}

Verified verify_model(const Exec& ex, const std::filesystem::path& dir, const VerifyOptions& options) {
    const auto model = load_model(dir, options.dtype);
    model->move_to(ex);
    const SafetensorsFile expected = SafetensorsFile::open(dir / "expected.safetensors");
    int64_t b = 0, l = 0;
    const auto input_ids = read_id_matrix(expected, "input_ids", b, l);
    std::vector<int64_t> cu_seqlens;
    for (int64_t i = 0; i <= b; ++i) cu_seqlens.push_back(i * l);

    Verified out;
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens, .activation = options.dtype};
    const Var hidden = model->hidden(ctx, {input_ids.data(), {b * l}}, nullptr);
    const Tensor logits = model->logits(ctx, hidden.value());
    out.quantities.push_back(
        {"logits", relative_l2(logits, expected_tensor(expected, "logits", {b, l, model->vocab()})),
         options.logits_tolerance});
    if (options.dtype != DType::f32) return out;
    verify_greedy(ex, *model, expected, input_ids, l, out);
    verify_gradients(ex, *model, expected, input_ids, cu_seqlens, l, options, out);
    return out;
}

void record_expectation(const Exec& ex, const std::filesystem::path& dir, uint64_t seed) {
    constexpr int64_t kSequences = 2, kLength = 37, kPrompt = 5, kContinuation = 32;
    const auto model = load_model(dir, DType::f32);
    Random random(seed);
    std::vector<int32_t> input_ids;
    Tensor ids = Tensor::empty({kSequences, kLength}, DType::i64);
    for (int64_t i = 0; i < ids.size(); ++i) {
        input_ids.push_back(static_cast<int32_t>(random.next() % static_cast<uint64_t>(model->vocab())));
        ids.data<int64_t>()[i] = input_ids.back();
    }
    const int64_t cu_seqlens[] = {0, kLength, 2 * kLength};
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens};
    const Var hidden = model->hidden(ctx, {input_ids.data(), {kSequences * kLength}}, nullptr);
    std::vector<NamedTensor> tensors = {
        {"input_ids", ids},
        {"logits", model->logits(ctx, hidden.value()).reshape({kSequences, kLength, model->vocab()})}};
    const auto continuation = greedy_continuation(ex, *model, {input_ids.data(), kPrompt}, kContinuation);
    Tensor greedy = Tensor::empty({1, kPrompt + kContinuation}, DType::i64);
    for (int64_t i = 0; i < greedy.size(); ++i) {
        const auto at = static_cast<size_t>(i);
        greedy.data<int64_t>()[i] = i < kPrompt ? input_ids[at] : continuation[at - kPrompt];
    }
    tensors.push_back({"greedy", greedy});
    tensors.push_back({"loss", loss_and_gradients(ex, *model, input_ids, cu_seqlens, kLength).reshape({})});
    model->visit([&](const std::string& name, Parameter& p) {
        tensors.push_back({std::string(kGradient) + name, p.var.grad(ex)});
    });
    write_safetensors(dir / "expected.safetensors", tensors);
}

}  // namespace ssm
