#include "ssm/ops/sample/sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "tests/support/compare.h"
#include "tests/support/expect_error.h"
#include "tests/support/targets.h"

namespace ssm {
namespace {

using test::expect_error;
using test::Random;

uint64_t splitmix64(uint64_t& state) {  // Steele, Lea & Flood 2014
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// The header's text in f64, with a full sort.
struct Reference {
    SamplerOptions o;
    uint64_t state;

    explicit Reference(SamplerOptions options) : o(options), state(options.seed) {}

    // Probabilities by id; empty for greedy, whose choice is `best`.
    std::vector<double> distribution(const std::vector<float>& logits, int64_t valid,
                                     const std::vector<int32_t>& history, int32_t& best) const {
        std::vector<double> x(logits.begin(), logits.begin() + valid);
        const double r = double{o.repetition_penalty};
        for (const int32_t id : std::set<int32_t>(history.begin(), history.end())) {
            double& v = x[static_cast<size_t>(id)];
            // f32 as the contract has it: a penalised logit may tie with another.
            v = static_cast<double>(static_cast<float>(v > 0 ? v / r : v * r));
        }
        std::vector<int32_t> order(x.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
            return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
        });
        best = order[0];
        if (o.temperature == 0) return {};
        std::vector<double> p(x.size(), 0);
        const size_t k = o.top_k > 0 ? std::min(x.size(), static_cast<size_t>(o.top_k)) : x.size();
        double total = 0;
        for (size_t i = 0; i < k; ++i) {
            const auto id = static_cast<size_t>(order[i]);
            p[id] = std::exp((x[id] - x[static_cast<size_t>(best)]) / double{o.temperature});
            total += p[id];
        }
        double sum = 0, kept = 0;
        for (size_t i = 0; i < k; ++i) {
            const auto id = static_cast<size_t>(order[i]);
            const bool reached = o.top_p < 1 && sum >= double{o.top_p} * total;
            sum += p[id];
            if (reached || p[id] < double{o.min_p}) p[id] = 0;
            kept += p[id];
        }
        for (double& v : p) v /= kept;
        return p;
    }

    int32_t sample(const std::vector<float>& logits, int64_t valid, const std::vector<int32_t>& history) {
        int32_t best = 0;
        const std::vector<double> p = distribution(logits, valid, history, best);
        if (p.empty()) return best;
        const double u = static_cast<double>(splitmix64(state) >> 11) * 0x1p-53;
        double sum = 0;
        for (size_t i = 0; i < p.size(); ++i) {
            sum += p[i];
            if (sum > u) return static_cast<int32_t>(i);
        }
        return -1;
    }
};

std::vector<float> random_logits(int64_t v, float spread, Random& random) {
    std::vector<float> x(static_cast<size_t>(v));
    for (float& value : x) {  // roughly normal, as logits are
        value = spread * (random.uniform(-1, 1) + random.uniform(-1, 1) + random.uniform(-1, 1));
    }
    return x;
}

std::vector<SamplerOptions> option_sets() {
    std::vector<SamplerOptions> all = {{.temperature = 0}, {.temperature = 0, .repetition_penalty = 1.7f}};
    for (const float temperature : {0.3f, 1.0f, 2.5f}) {
        for (const int32_t top_k : {0, 1, 5, 40, 3000}) {
            for (const float top_p : {1.0f, 0.95f, 0.5f, 1e-6f}) {
                for (const float min_p : {0.0f, 0.05f}) {
                    all.push_back({.temperature = temperature,
                                   .top_k = top_k,
                                   .top_p = top_p,
                                   .min_p = min_p,
                                   .repetition_penalty = top_k == 5 ? 1.3f : 1.0f,
                                   .seed = 1000 + all.size()});
                }
            }
        }
    }
    return all;
}

// Token for token the same as the reference: the set, the order of the draw and the random numbers.
TEST(Sample, MatchesReference) {
    test::for_each_target([] {
        Random random(3);
        for (const SamplerOptions& o : option_sets()) {
            for (const int64_t v : {1, 63, 64, 65, 1000, 3100}) {
                SCOPED_TRACE(testing::Message() << "v " << v << " temperature " << o.temperature << " k "
                                                << o.top_k << " p " << o.top_p << " min_p " << o.min_p);
                Sampler sampler(o);
                Reference reference(o);
                for (const float spread : {3.0f, 3.0f, 0.01f, 0.0f}) {
                    std::vector<float> logits = random_logits(v, spread, random);
                    const std::vector<int32_t> history = {0, static_cast<int32_t>(v / 2), 0};
                    logits.push_back(1e9f);  // padding beyond `valid`
                    ASSERT_EQ(sampler.sample(logits, v, history), reference.sample(logits, v, history));
                }
                EXPECT_EQ(sampler.draws(), o.temperature == 0 ? 0u : 4u);
            }
        }
    });
}

// Pearson's chi-square of 20,000 draws against the exact distribution: the mean is the number of kept ids
// less one, the standard deviation sqrt(2 mean); five of them is far beyond chance.
TEST(Sample, FrequenciesFollowTheDistribution) {
    Random random(5);
    const std::vector<float> logits = random_logits(300, 1.0f, random);
    for (const SamplerOptions& o :
         {SamplerOptions{.seed = 1}, SamplerOptions{.temperature = 0.7f, .seed = 2},
          SamplerOptions{.top_k = 20, .seed = 3}, SamplerOptions{.top_p = 0.8f, .seed = 4},
          SamplerOptions{.min_p = 0.2f, .seed = 5},
          SamplerOptions{.temperature = 1.4f, .top_k = 50, .top_p = 0.9f, .min_p = 0.05f, .seed = 6}}) {
        int32_t best = 0;
        const std::vector<double> p = Reference(o).distribution(logits, 300, {}, best);
        constexpr int kDraws = 20000;
        std::vector<int> count(300, 0);
        Sampler sampler(o);
        for (int i = 0; i < kDraws; ++i) ++count[static_cast<size_t>(sampler.sample(logits, 300, {}))];
        double chi = 0, freedom = -1;
        for (size_t i = 0; i < p.size(); ++i) {
            if (p[i] == 0) {
                EXPECT_EQ(count[i], 0) << "id " << i << " is not in the set";
                continue;
            }
            const double expected = p[i] * kDraws, difference = count[i] - expected;
            chi += difference * difference / expected;
            ++freedom;
        }
        EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom)) << "seed " << o.seed;
    }
}

TEST(Sample, TiesGoToTheSmallerId) {
    std::vector<float> flat(200, 0.5f);
    flat[7] = flat[150] = 2.0f;
    EXPECT_EQ(Sampler({.temperature = 0}).sample(flat, 200, {}), 7);
    EXPECT_EQ(Sampler({.top_k = 1}).sample(flat, 200, {}), 7);
    Sampler three({.top_k = 3, .seed = 9}), nucleus({.top_p = 0.03f, .seed = 9});
    std::map<int32_t, int> seen, seen_nucleus;
    for (int i = 0; i < 300; ++i) {
        ++seen[three.sample(flat, 200, {})];
        ++seen_nucleus[nucleus.sample(flat, 200, {})];
    }
    EXPECT_EQ(seen.size(), 3u);
    EXPECT_TRUE(seen.contains(0) && seen.contains(7) && seen.contains(150));
    // exp(1.5) = 4.48 each of 206.96: one of the two reaches 2.2 %, both 4.3 %.
    EXPECT_EQ(seen_nucleus.size(), 2u);
}

TEST(Sample, SavedDrawsContinueTheSameWay) {
    Random random(7);
    const std::vector<float> logits = random_logits(500, 2.0f, random);
    Sampler whole({.seed = 42}), first({.seed = 42}), second({.seed = 42});
    std::vector<int32_t> expected, actual;
    for (int i = 0; i < 20; ++i) expected.push_back(whole.sample(logits, 500, {}));
    for (int i = 0; i < 8; ++i) actual.push_back(first.sample(logits, 500, {}));
    second.set_draws(first.draws());
    for (int i = 8; i < 20; ++i) actual.push_back(second.sample(logits, 500, {}));
    EXPECT_EQ(actual, expected);
}

TEST(Sample, MinusInfinityIsNeverDrawnAndExtremeTemperaturesWork) {
    std::vector<float> logits(130, -INFINITY);
    logits[64] = 1.0f;
    logits[129] = 1.0f;
    for (const SamplerOptions& o :
         {SamplerOptions{}, SamplerOptions{.top_k = 10}, SamplerOptions{.top_p = 0.999f},
          SamplerOptions{.temperature = 1e-42f}, SamplerOptions{.temperature = 1e30f}}) {
        Sampler sampler(o);
        std::set<int32_t> seen;
        for (int i = 0; i < 200; ++i) seen.insert(sampler.sample(logits, 130, {}));
        EXPECT_EQ(seen, (std::set<int32_t>{64, 129}));
    }
}

TEST(Argmax, FirstOfTheLargestAtEveryPosition) {
    test::for_each_target([] {
        for (const size_t n : {1u, 2u, 17u, 1023u, 1024u, 1025u, 2500u}) {
            for (size_t at = 0; at < n; at += n < 100 ? 1 : 37) {
                std::vector<float> x(n, -3.0f);
                x[at] = -1.0f;
                x[n - 1] = std::max(x[n - 1], -1.0f);  // a later tie
                ASSERT_EQ(argmax(x), static_cast<int32_t>(at)) << n;
                x[at] = NAN;
                expect_error(
                    fmt::format("[argmax] the logit of id {} is NaN", at).c_str(), [&] { argmax(x); },
                    ErrorCode::numeric);
            }
        }
        EXPECT_EQ(argmax(std::vector<float>(50, -INFINITY)), 0);
        EXPECT_EQ(argmax(std::vector<float>{1, INFINITY, 2}), 1);
    });
}

TEST(Sample, Errors) {
    const auto make = [](SamplerOptions o) { return [o] { Sampler s(o); }; };
    expect_error("[sample] temperature must be finite and >= 0 but is -1", make({.temperature = -1}));
    expect_error("[sample] temperature must be finite and >= 0 but is nan", make({.temperature = NAN}));
    expect_error("[sample] top_k must be >= 0 (0: off) but is -2", make({.top_k = -2}));
    expect_error("[sample] top_p must be in (0, 1] but is 0", make({.top_p = 0}));
    expect_error("[sample] top_p must be in (0, 1] but is 1.5", make({.top_p = 1.5f}));
    expect_error("[sample] min_p must be in [0, 1) but is 1", make({.min_p = 1}));
    expect_error("[sample] repetition_penalty must be finite and > 0 but is 0",
                 make({.repetition_penalty = 0}));

    const std::vector<float> flat(100, 1.0f);
    Sampler draw({}), greedy({.temperature = 0});
    for (Sampler* s : {&draw, &greedy}) {
        std::vector<float> bad = flat;
        bad[70] = NAN;
        const auto run = [&] { s->sample(bad, 100, {}); };
        expect_error("[sample] the logit of id 70 is NaN", run, ErrorCode::numeric);
        EXPECT_LT(s->sample(bad, 70, {}), 70);  // beyond `valid` nobody looks
        bad[70] = INFINITY;
        expect_error("[sample] the logit of id 70 is inf", run, ErrorCode::numeric);
        bad.assign(100, -INFINITY);
        expect_error("[sample] all 100 logits are -inf", run, ErrorCode::numeric);
    }
    expect_error("[sample] valid = 101 is outside [1, 100], the number of logits",
                 [&] { draw.sample(flat, 101, {}); });
    expect_error("[sample] valid = 0 is outside [1, 100], the number of logits",
                 [&] { draw.sample(flat, 0, {}); });
    expect_error("[sample] the history holds id 100, outside [0, 100)",
                 [&] { draw.sample(flat, 100, std::vector<int32_t>{100}); });
    expect_error("[argmax] there are no logits", [] { argmax({}); });
    std::vector<int32_t> ids(2);
    expect_error("[argmax] `ids` must be [b] = [1] but is [2]", [&] {
        argmax(make_cpu_exec(1), {flat.data(), {1, 100}}, {ids.data(), {2}});
    });
}

TEST(Argmax, OfStridedRows) {
    const std::vector<float> logits = {1, 5, 5, 9, -2, -3, -1, 9, 0, -0.0f, 0, 9};
    std::vector<int32_t> ids(6, -7);
    argmax(make_cpu_exec(1), View<const float, 2>(logits.data(), {3, 3}, 4),
           View<int32_t, 1>(ids.data(), {3}, 2));
    EXPECT_EQ(ids, (std::vector<int32_t>{1, -7, 2, -7, 0, -7}));
    argmax(make_cpu_exec(1), View<const float, 2>(nullptr, {0, 3}), View<int32_t, 1>(nullptr, {0}));
}

}  // namespace
}  // namespace ssm
