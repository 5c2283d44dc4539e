#include "ssm/generate/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace ssm {
namespace {

// Adds the likelihood of the tokens begin+1 .. end given those from begin on, split at `cu_seqlens`.
void add_piece(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids, int64_t begin, int64_t end,
               CuSeqlens cu_seqlens, ModelState* state, Evaluation& result) {
    const int64_t t = end - begin;
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens, .activation = model.dtype()};
    const Var hidden = model.hidden(ctx, {ids.data() + begin, {t}}, state);
    Tensor nll = Tensor::empty(ex, {t});
    model.nll(ctx, hidden.value(), {ids.data() + begin + 1, {t}}, nll.view<float, 1>());
    for (int64_t i = 0; i < t; ++i) {
        const auto x = static_cast<double>(nll.data<float>()[i]);
        if (std::isnan(x))
            fail(ErrorCode::numeric, "eval", "the likelihood of token {} is NaN", begin + 1 + i);
        result.nll += x;
    }
    result.tokens += t;
}

}  // namespace

Evaluation evaluate(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids,
                    const EvaluateOptions& options, const std::function<void(const Evaluation&)>& progress) {
    require(options.window >= 1, "eval", "'window' must be at least 1 but is {}", options.window);
    require(ids.size() >= 2, "eval", "at least 2 tokens are needed but there are {}", ids.size());
    const auto start = std::chrono::steady_clock::now();
    const auto total = static_cast<int64_t>(ids.size()) - 1;
    // Independent windows run side by side; a window longer than a batch, or a carried state, in pieces.
    const bool in_pieces = options.carry_state || options.window > options.batch_tokens;
    const int64_t together = std::max<int64_t>(1, options.batch_tokens / options.window);
    ModelState state;
    Evaluation result;
    std::vector<int64_t> cu_seqlens;
    for (int64_t begin = 0; begin < total;) {
        cu_seqlens.assign(1, 0);
        int64_t end = begin;
        if (in_pieces) {
            const int64_t next_window =
                options.carry_state ? total : (begin / options.window + 1) * options.window;
            if (begin == 0 || (!options.carry_state && begin % options.window == 0))
                state = model.new_state(1);
            end = std::min({begin + options.batch_tokens, next_window, total});
            cu_seqlens.push_back(end - begin);
        } else {
            for (int64_t w = 0; w < together && end < total; ++w) {
                end = std::min(end + options.window, total);
                cu_seqlens.push_back(end - begin);
            }
        }
        add_piece(ex, model, ids, begin, end, cu_seqlens, in_pieces ? &state : nullptr, result);
        result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (progress) progress(result);
        begin = end;
    }
    return result;
}

}  // namespace ssm
