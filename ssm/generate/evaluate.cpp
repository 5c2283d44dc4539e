#include "ssm/generate/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace ssm {
namespace {

// Tokens of a carried sequence at a time: as fast as more, in less memory.
constexpr int64_t kStreamPiece = 512;

// Adds the likelihood of the tokens begin+1 .. end given those from begin on, split at `cu_seqlens`.
void add_piece(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids, int64_t begin, int64_t end,
               CuSeqlens cu_seqlens, ModelState* state, Evaluation& result) {
    const int64_t t = end - begin;
    Ctx ctx{.exec = ex, .cu_seqlens = cu_seqlens, .activation = model.dtype()};
    const Var hidden = model.hidden(ctx, {ids.data() + begin, {t}}, state);
    const Tensor nll = Tensor::empty({t});
    model.nll(ctx, hidden.value(), {ids.data() + begin + 1, {t}}, nll.view<float, 1>());
    for (int64_t i = 0; i < t; ++i) {
        const auto x = static_cast<double>(nll.data<float>()[i]);
        if (std::isnan(x))
            fail(ErrorCode::numeric, "eval", "the likelihood of token {} is NaN", begin + 1 + i);
        result.nll += x;
    }
    result.tokens += t;
}

// Where the piece that begins at `begin` ends: the sequence's first piece is the odd one, the others are
// whole.
int64_t end_of_stream_piece(const EvaluateOptions& options, int64_t begin, int64_t total) {
    const int64_t piece = std::min(options.batch_tokens, kStreamPiece);
    const int64_t odd = total % piece;
    return begin == 0 && odd > 0 ? odd : begin + piece;
}

// Reads one piece of each length with a state that is thrown away: what only the first use costs (kernels
// compiled, memory touched) is not counted as time per token.
void rehearse(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids,
              const EvaluateOptions& options, int64_t total) {
    for (int64_t begin = 0, pieces = 0; begin < total && pieces < 2; ++pieces) {
        const int64_t end = end_of_stream_piece(options, begin, total);
        const std::vector<int64_t> cu_seqlens{0, end - begin};
        ModelState state = model.new_state(1);
        Evaluation ignored;
        add_piece(ex, model, ids, begin, end, cu_seqlens, &state, ignored);
        begin = end;
    }
}

// The next piece in [begin, total): its end, and in `cu_seqlens` the windows in it. Independent windows run
// side by side; a window longer than a batch, or a carried state, in pieces.
int64_t next_piece(const EvaluateOptions& options, bool in_pieces, int64_t begin, int64_t total,
                   std::vector<int64_t>& cu_seqlens) {
    cu_seqlens.assign(1, 0);
    int64_t end = begin;
    if (options.carry_state) {
        end = end_of_stream_piece(options, begin, total);
    } else if (in_pieces) {
        end = std::min({begin + options.batch_tokens, (begin / options.window + 1) * options.window, total});
    } else {
        const int64_t together = std::max<int64_t>(1, options.batch_tokens / options.window);
        for (int64_t w = 0; w < together && end < total; ++w) {
            end = std::min(end + options.window, total);
            cu_seqlens.push_back(end - begin);
        }
        return end;
    }
    cu_seqlens.push_back(end - begin);
    return end;
}

}  // namespace

Evaluation evaluate(const Exec& ex, LanguageModel& model, std::span<const int32_t> ids,
                    const EvaluateOptions& options, const std::function<void(const Evaluation&)>& progress) {
    require(options.window >= 1, "eval", "'window' must be at least 1 but is {}", options.window);
    require(ids.size() >= 2, "eval", "at least 2 tokens are needed but there are {}", ids.size());
    const auto total = static_cast<int64_t>(ids.size()) - 1;
    if (options.carry_state) rehearse(ex, model, ids, options, total);
    const auto start = std::chrono::steady_clock::now();
    const bool in_pieces = options.carry_state || options.window > options.batch_tokens;
    ModelState state;
    Evaluation result;
    std::vector<int64_t> cu_seqlens;
    for (int64_t begin = 0; begin < total;) {
        if (in_pieces && (begin == 0 || (!options.carry_state && begin % options.window == 0)))
            state = model.new_state(1);
        const int64_t end = next_piece(options, in_pieces, begin, total, cu_seqlens);
        add_piece(ex, model, ids, begin, end, cu_seqlens, in_pieces ? &state : nullptr, result);
        result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (progress) progress(result);
        begin = end;
    }
    return result;
}

}  // namespace ssm
