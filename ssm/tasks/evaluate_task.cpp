#include "ssm/tasks/evaluate_task.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "ssm/ops/embedding/embedding.h"
#include "ssm/ops/sample/sample.h"
#include "ssm/train/batch_source.h"

namespace ssm {
namespace {

constexpr int64_t kSideBySide = 16;  // long sequences in pieces; more of them would make the pieces short

// Positions [begin, begin + count) of sequences first .. first + side, one after another.
void write_pieces(const Task& task, const EvaluateTaskOptions& o, int64_t first, int64_t side, int64_t begin,
                  int64_t count, Batch& batch) {
    batch.ids.resize(static_cast<size_t>(side * count));
    batch.targets.resize(batch.ids.size());
    batch.cu_seqlens.assign(1, 0);
    const std::span<int32_t> ids(batch.ids), targets(batch.targets);
    const auto size = static_cast<size_t>(count);
    for (int64_t i = 0; i < side; ++i) {
        const auto at = static_cast<size_t>(i) * size;
        task.write(sequence_key(o.seed, o.split, static_cast<uint64_t>(first + i)),
                   {.length = o.length,
                    .begin = begin,
                    .ids = ids.subspan(at, size),
                    .targets = targets.subspan(at, size)});
        batch.cu_seqlens.push_back((i + 1) * count);
    }
}

// Rows of x on its device.
Tensor gather(const Exec& ex, const Tensor& x, const std::vector<int32_t>& rows) {
    const auto n = static_cast<int64_t>(rows.size());
    const Tensor there = on_device_of(ex, View<const int32_t, 1>(rows.data(), {n}));
    Tensor y = Tensor::empty(ex, {n, x.dim(1)}, x.dtype());
    const auto copy = [&]<class T>(T) {
        embedding(ex, there.view<const int32_t, 1>(), x.view<const T, 2>(), y.view<T, 2>());
    };
    if (x.dtype() == DType::bf16) {
        copy(bf16{});
    } else {
        copy(float{});
    }
    return y;
}

// Compares the model's answers in this batch; `wrong` marks the sequences that have a wrong one.
void count_answers(const Exec& ex, LanguageModel& model, Ctx& ctx, const Batch& batch, const Tensor& hidden,
                   std::vector<char>& wrong, TaskAccuracy& result) {
    std::vector<int32_t> rows, targets;
    for (size_t t = 0; t < batch.targets.size(); ++t) {
        if (batch.targets[t] < 0) continue;
        rows.push_back(static_cast<int32_t>(t));
        targets.push_back(batch.targets[t]);
    }
    if (rows.empty()) return;
    const auto n = static_cast<int64_t>(rows.size());
    const Tensor asked = gather(ex, hidden, rows), nll = Tensor::empty({n});
    model.nll(ctx, asked, View<const int32_t, 1>(targets.data(), {n}), nll.view<float, 1>());
    for (int64_t i = 0; i < n; ++i) {
        const float loss = nll.data<float>()[i];
        if (std::isnan(loss))
            fail(ErrorCode::numeric, "task", "the likelihood of an answer at length {} is NaN",
                 result.length);
        result.nll += static_cast<double>(loss);
    }
    const Tensor ids = Tensor::empty(ex, {n}, DType::i32), logits = model.logits(ctx, asked);
    argmax(ex, logits.view<const float, 2>(), ids.view<int32_t, 1>());
    const Tensor answers = ids.to_host();
    const int64_t piece = batch.cu_seqlens[1];
    for (int64_t i = 0; i < n; ++i) {
        const bool right = answers.data<int32_t>()[i] == targets[i];
        result.right += right;
        if (!right) wrong[rows[i] / piece] = 1;
    }
    result.answers += n;
}

}  // namespace

TaskAccuracy evaluate_task(const Exec& ex, LanguageModel& model, const Task& task,
                           const EvaluateTaskOptions& o) {
    require(o.length >= task.shortest, "task", "'{}' needs a length of at least {} but it is {}", task.name,
            task.shortest, o.length);
    require(o.sequences >= 1, "task", "at least 1 sequence is needed but there are {}", o.sequences);
    const auto start = std::chrono::steady_clock::now();
    const bool in_pieces = o.length > o.batch_tokens;
    const int64_t together = in_pieces ? kSideBySide : std::max<int64_t>(1, o.batch_tokens / o.length);
    TaskAccuracy result{.length = o.length, .sequences = o.sequences};
    Batch batch;
    for (int64_t first = 0; first < o.sequences; first += together) {
        const int64_t side = std::min(together, o.sequences - first);
        const int64_t piece = in_pieces ? std::max<int64_t>(1, o.batch_tokens / side) : o.length;
        ModelState state = in_pieces ? model.new_state(side) : ModelState{};
        std::vector<char> wrong(static_cast<size_t>(side), 0);
        for (int64_t begin = 0; begin < o.length; begin += piece) {
            write_pieces(task, o, first, side, begin, std::min(piece, o.length - begin), batch);
            Ctx ctx{.exec = ex,
                    .cu_seqlens = batch.cu_seqlens,
                    .activation = o.activation,
                    .recomputed_later = o.training};
            const View<const int32_t, 1> ids(batch.ids.data(), {batch.tokens()});
            const Var hidden = model.hidden(ctx, ids, in_pieces ? &state : nullptr);
            count_answers(ex, model, ctx, batch, hidden.value(), wrong, result);
        }
        result.right_sequences += side - std::count(wrong.begin(), wrong.end(), 1);
    }
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
}

void require_fits(const LanguageModel& model, const Task& task) {
    require(model.vocab() >= task.vocab, "task", "the model's vocabulary is {} but '{}' has {} tokens",
            model.vocab(), task.name, task.vocab);
}

Validation TaskValidator::validate() {
    EvaluateTaskOptions options = options_;
    options.training = true;
    const TaskAccuracy a = evaluate_task(exec_, model_, task_, options);
    return {.loss = a.mean_nll(), .bits_per_byte = {}, .accuracy = a.accuracy(), .tokens = a.answers};
}

}  // namespace ssm
