// Evaluation: windows, carried state and batches against the f64 reference.
#include "ssm/generate/evaluate.h"

#include <gtest/gtest.h>

#include "tests/support/model_case.h"
#include "tests/support/temp_folder.h"

namespace ssm::test {
namespace {

// Sum of the reference's nll over windows of `window` predicted tokens, each from the zero state.
double reference_nll(const ReferenceModel& reference, const std::vector<int32_t>& ids, int64_t window) {
    double sum = 0;
    const auto total = static_cast<int64_t>(ids.size()) - 1;
    for (int64_t begin = 0; begin < total; begin += window) {
        const int64_t end = std::min(begin + window, total), cu_seqlens[] = {0, end - begin};
        for (const double x : reference.nll({ids.data() + begin, ids.data() + end},
                                            {ids.data() + begin + 1, ids.data() + end + 1}, cu_seqlens)) {
            sum += x;
        }
    }
    return sum;
}

TEST(Evaluate, WindowsMatchReference) {
    for (const ReferenceShape& shape :
         {ReferenceShape{}, ReferenceShape{.kind = ReferenceShape::Kind::mamba2, .tied = false}}) {
        const ModelCase c(shape);
        const Exec ex = make_cpu_exec(1);
        const auto ids = PackedTokens({151}, shape.vocab).ids;
        // Windows of one token, that divide, that do not, longer than a batch, longer than the text.
        for (const int64_t window : {1, 30, 64, 100, 150, 151, 1000}) {
            for (const int64_t batch : {1, 64, 2048}) {
                const Evaluation e = evaluate(ex, *c.model, ids, {.window = window, .batch_tokens = batch});
                const double expected = reference_nll(c.reference, ids, window);
                EXPECT_EQ(e.tokens, 150);
                EXPECT_NEAR(e.nll, expected, 1e-5 * expected) << window << " " << batch;
                EXPECT_NEAR(e.mean_nll(), expected / 150, 1e-5 * expected);
            }
        }
    }
}

// A carried state makes one window of everything, however it is cut.
TEST(Evaluate, CarriedStateIsOneWindow) {
    const ModelCase c(ReferenceShape{});
    const Exec ex = make_cpu_exec(1);
    const auto ids = PackedTokens({151}, 11).ids;
    const double expected = reference_nll(c.reference, ids, 1000);
    EXPECT_GT(std::abs(reference_nll(c.reference, ids, 10) - expected), 1e-3);  // the windows do matter
    for (const int64_t batch : {1, 7, 64, 2048}) {
        const Evaluation e =
            evaluate(ex, *c.model, ids, {.window = 10, .carry_state = true, .batch_tokens = batch});
        EXPECT_EQ(e.tokens, 150);
        EXPECT_NEAR(e.nll, expected, 1e-5 * expected) << batch;
    }
}

TEST(Evaluate, ReportsProgress) {
    const ModelCase c(ReferenceShape{});
    std::vector<int64_t> tokens;
    const Evaluation e =
        evaluate(make_cpu_exec(1), *c.model, PackedTokens({41}, 11).ids, {.window = 10, .batch_tokens = 20},
                 [&](const Evaluation& now) { tokens.push_back(now.tokens); });
    EXPECT_EQ(tokens, (std::vector<int64_t>{20, 40}));
    EXPECT_GT(e.seconds, 0);
}

TEST(Evaluate, Errors) {
    const ModelCase c(ReferenceShape{});
    const Exec ex = make_cpu_exec(1);
    const auto message = [&](const std::vector<int32_t>& ids, const EvaluateOptions& options) {
        return error_of([&] { evaluate(ex, *c.model, ids, options); });
    };
    EXPECT_EQ(message({1}, {}), "[eval] at least 2 tokens are needed but there are 1");
    EXPECT_EQ(message({}, {}), "[eval] at least 2 tokens are needed but there are 0");
    EXPECT_EQ(message({1, 2}, {.window = 0}), "[eval] 'window' must be at least 1 but is 0");
    EXPECT_NE(message({1, 11, 2}, {}).find("11"), std::string::npos);
    EXPECT_NE(message({1, 2, 11}, {}).find("11"), std::string::npos);  // as a target only
    c.model->visit([](const std::string& name, Parameter& p) {
        if (name == "backbone.layers.1.norm.weight") p.value().data<float>()[0] = NAN;
    });
    EXPECT_EQ(message({1, 2, 3}, {}), "[eval] the likelihood of token 1 is NaN");
}

}  // namespace
}  // namespace ssm::test
