#include "ssm/ops/selective_scan/selective_scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "ssm/ops/selective_scan/selective_scan_test.h"
#include "tests/support/compare.h"
#include "tests/support/golden.h"
#include "tests/support/gradcheck.h"
#include "tests/support/shared.h"

namespace ssm {
namespace {

using TimeParallel = SelectiveScanOptions::TimeParallel;
using test::expect_close;
using test::Flags;
using test::Problem;
using test::Random;

template <class T>
constexpr double kTolerance = std::is_same_v<T, float> ? 1e-5 : 1e-2;

template <class T>
struct Result {
    std::vector<T> y;
    std::vector<float> final_state, chunk_states;
};

template <class T>
Result<T> run(const Problem<T>& p, int threads = 1, const SelectiveScanOptions& options = {}) {
    const int64_t chunks = selective_scan_chunks(p.cu, options.chunk);
    std::vector<T> padded = test::nan_vector<T>((p.t + 1) * (p.d + p.pad));
    Result<T> r{{}, test::nan_vector(p.s * p.d * p.n), test::nan_vector(chunks * p.d * p.n + 1)};
    selective_scan(make_cpu_exec(threads), p.inputs(), View<T, 2>(padded.data(), {p.t, p.d}, p.d + p.pad),
                   View<float, 3>(r.final_state.data(), {p.s, p.d, p.n}),
                   View<float, 3>(r.chunk_states.data(), {chunks, p.d, p.n}), options);
    r.chunk_states.pop_back();
    for (int64_t i = 0; i < p.t; ++i) {
        const auto row = padded.begin() + i * (p.d + p.pad);
        r.y.insert(r.y.end(), row, row + p.d);
        for (int64_t j = 0; j < p.pad; ++j) {
            EXPECT_TRUE(std::isnan(static_cast<float>(row[p.d + j]))) << "wrote outside of the row";
        }
    }
    return r;
}

template <class T>
void check(const Problem<T>& p, int threads = 1, const SelectiveScanOptions& options = {}) {
    SCOPED_TRACE(testing::Message() << "d " << p.d << " n " << p.n << " t " << p.t << " s " << p.s << " pad "
                                    << p.pad << " chunk " << options.chunk);
    const Result<T> r = run(p, threads, options);
    expect_close(r.y, p.reference.y, kTolerance<T>, "y");
    expect_close(r.final_state, p.reference.final_state, 1e-5, "final_state");
}

template <class T>
class SelectiveScan : public testing::Test {};
using Activations = testing::Types<float, bf16>;
TYPED_TEST_SUITE(SelectiveScan, Activations);

TYPED_TEST(SelectiveScan, MatchesReferenceAtEveryLengthAroundAChunk) {
    for (int64_t chunk : {7, 64}) {
        for (int64_t l : {int64_t{0}, int64_t{1}, chunk - 1, chunk, chunk + 1, 2 * chunk + 3}) {
            check(Problem<TypeParam>(20, 16, {l}), 1, {.chunk = chunk});
        }
    }
}

TYPED_TEST(SelectiveScan, MatchesReferenceAtEveryWidth) {
    for (int64_t d : {1, 3, 15, 16, 17, 40}) {
        for (int64_t n : {1, 2, 3, 8, 13, 16, 31, 32, 64}) check(Problem<TypeParam>(d, n, {9, 5}, 3), 2);
    }
}

TYPED_TEST(SelectiveScan, MatchesReferenceWithoutOptionalArguments) {
    for (int bits = 0; bits < 32; ++bits) {
        const Flags flags{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
                          (bits & 16) != 0};
        check(Problem<TypeParam>(19, 16, {11}, 0, flags), 1);
    }
}

TYPED_TEST(SelectiveScan, PackedSequencesNeverSeeEachOther) {
    check(Problem<TypeParam>(33, 16, {0, 5, 0, 0, 130, 1, 64, 0}, 1), 2);
    check(Problem<TypeParam>(33, 16, {0, 5, 0, 0, 130, 1, 64, 0}, 1), 3, {.chunk = 16});
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
    return std::ranges::equal(std::as_bytes(std::span(a)), std::as_bytes(std::span(b)));
}

TYPED_TEST(SelectiveScan, SplitOverTimeMatchesReferenceAndDoesNotDependOnThreads) {
    for (const std::vector<int64_t>& lengths :
         {std::vector<int64_t>{0}, {1}, {35}, {7 * 16}, {16, 0, 17, 15, 200}}) {
        const Problem<TypeParam> p(21, 16, lengths, 2);
        const SelectiveScanOptions options{.chunk = 16, .time_parallel = TimeParallel::always};
        const auto one = run(p, 1, options);
        expect_close(one.y, p.reference.y, kTolerance<TypeParam>, "y");
        expect_close(one.final_state, p.reference.final_state, 1e-5, "final_state");
        for (int threads : {2, 3}) {
            const auto other = run(p, threads, options);
            EXPECT_TRUE(same_bytes(one.y, other.y));
            EXPECT_EQ(one.final_state, other.final_state);
            EXPECT_EQ(one.chunk_states, other.chunk_states);
        }
    }
}

TYPED_TEST(SelectiveScan, DoesNotDependOnThreadsOrChunks) {
    const Problem<TypeParam> p(50, 16, {70, 3, 90});
    const auto one = run(p, 1, {.chunk = 64, .time_parallel = TimeParallel::never});
    for (int threads : {1, 2, 3}) {
        for (int64_t chunk : {1, 5, 64, 1000}) {
            const auto other = run(p, threads, {.chunk = chunk, .time_parallel = TimeParallel::never});
            EXPECT_TRUE(same_bytes(one.y, other.y));
            EXPECT_EQ(one.final_state, other.final_state);
        }
    }
}

TYPED_TEST(SelectiveScan, OutputMayAliasUOrZ) {
    Problem<TypeParam> p(24, 16, {100});
    const auto expected = run(p).y;
    for (auto mode : {TimeParallel::never, TimeParallel::always}) {
        for (bool over_u : {true, false}) {
            Problem<TypeParam> q = p;
            auto& buffer = over_u ? q.u : q.z;
            selective_scan(make_cpu_exec(2), q.inputs(), View<TypeParam, 2>(buffer.data(), {q.t, q.d}), {},
                           {}, {.chunk = 16, .time_parallel = mode});
            buffer.resize(expected.size(), TypeParam());
            expect_close(buffer, test::to_double(expected), kTolerance<TypeParam>, "aliased");
        }
    }
}

TYPED_TEST(SelectiveScan, StepsFoldToScan) {
    for (int64_t n : {1, 3, 4, 16, 20, 32}) {
        const int64_t s = 3, l = 12;
        const Problem<TypeParam> p(70, n, {l, l, l}, 5);
        const auto whole = run(p);
        std::vector<float> state = p.initial;
        for (int64_t i = 0; i < l; ++i) {
            auto in = p.inputs();  // row i of each sequence: a stride of l rows
            in.u = {in.u.row(i), {s, p.d}, l * in.u.stride}, in.z = {in.z.row(i), {s, p.d}, l * in.z.stride};
            in.delta = {in.delta.row(i), {s, p.d}, l * in.delta.stride};
            in.B = {in.B.row(i), {s, n}, l * in.B.stride}, in.C = {in.C.row(i), {s, n}, l * in.C.stride};
            std::vector<TypeParam> y = test::nan_vector<TypeParam>(s * p.d), expected;
            selective_scan_step(make_cpu_exec(2), in, View<float, 3>(state.data(), {s, p.d, n}),
                                View<TypeParam, 2>(y.data(), {s, p.d}));
            for (int64_t j = 0; j < s; ++j) {
                const auto row = whole.y.begin() + (j * l + i) * p.d;
                expected.insert(expected.end(), row, row + p.d);
            }
            expect_close(y, test::to_double(expected), kTolerance<TypeParam>, "y of a step");
        }
        expect_close(state, test::to_double(whole.final_state), 1e-5, "state after the steps");
    }
}

TYPED_TEST(SelectiveScan, ChunkStatesAreTheStatesEnteringEachChunk) {
    const int64_t chunk = 8, d = 18, n = 16;
    const Problem<TypeParam> p(d, n, {20, 0, 8});
    for (auto mode : {TimeParallel::never, TimeParallel::always}) {
        const auto r = run(p, 2, {.chunk = chunk, .time_parallel = mode});
        ASSERT_EQ(r.chunk_states.size(), static_cast<size_t>(4 * d * n));
        std::vector<double> expected;
        for (const auto& [sequence, length] : {std::pair{0, 0}, {0, 8}, {0, 16}, {2, 0}}) {
            test::ScanReference prefix = p.reference;  // of the sequence's first `length` tokens
            const int64_t begin = p.cu[sequence];
            prefix.cu_seqlens = {begin, begin + length};
            prefix.initial_state.erase(prefix.initial_state.begin(),
                                       prefix.initial_state.begin() + sequence * d * n);
            prefix.run();
            expected.insert(expected.end(), prefix.final_state.begin(), prefix.final_state.end());
        }
        expect_close(r.chunk_states, expected, 1e-5, "chunk_states");
    }
}

// The gradients of a problem; every buffer starts at 0.5 and holds padded rows where the inputs do.
struct Gradients {
    std::map<std::string, std::vector<float>> v;

    Gradients(const Problem<float>& p, const std::vector<float>& grad_y, const std::vector<float>& grad_final,
              int threads, int64_t chunk, SelectiveScanSet set = {}) {
        const Exec ex = make_cpu_exec(threads);
        const int64_t chunks = selective_scan_chunks(p.cu, chunk), wide = p.d + p.pad, narrow = p.n + p.pad;
        const auto states = run(p, threads, {.chunk = chunk}).chunk_states;
        auto start = [&](const char* name, int64_t size) {
            return (v[name] = std::vector<float>(static_cast<size_t>(size), test::kGradientStart)).data();
        };
        SelectiveScanGradients<float> grad{.set = set};
        grad.u = {start("u", p.t * wide), {p.t, p.d}, wide};
        grad.delta = {start("delta", p.t * wide), {p.t, p.d}, wide};
        grad.A = {start("A", p.d * p.n), {p.d, p.n}};
        grad.B = {start("B", p.t * narrow), {p.t, p.n}, narrow};
        grad.C = {start("C", p.t * narrow), {p.t, p.n}, narrow};
        if (p.flags.D) grad.D = {start("D", p.d), {p.d}};
        if (p.flags.z) grad.z = {start("z", p.t * wide), {p.t, p.d}, wide};
        grad.delta_bias = {start("delta_bias", p.d), {p.d}};
        grad.initial_state = {start("initial_state", p.s * p.d * p.n), {p.s, p.d, p.n}};
        selective_scan_backward(ex, p.inputs(), View<const float, 3>(states.data(), {chunks, p.d, p.n}),
                                View<const float, 2>(grad_y.data(), {p.t, p.d}),
                                View<const float, 3>(grad_final.data(), {p.s, p.d, p.n}), grad,
                                {.chunk = chunk});
        for (auto& [name, values] : v) {
            values = test::added(values);
            const bool wide_rows = name == "u" || name == "delta" || name == "z";
            if (wide_rows) values = without_padding(values, p.d, p.pad);
            if (name == "B" || name == "C") values = without_padding(values, p.n, p.pad);
        }
    }
    static std::vector<float> without_padding(const std::vector<float>& rows, int64_t width, int64_t pad) {
        std::vector<float> dense;
        for (size_t i = 0; i < rows.size(); ++i) {
            if (static_cast<int64_t>(i) % (width + pad) < width) {
                dense.push_back(rows[i]);
            } else {
                EXPECT_EQ(rows[i], 0.0f) << "wrote outside of the row";
            }
        }
        return dense;
    }
};

void check_gradients(const Problem<float>& p, int64_t chunk, int threads = 1) {
    SCOPED_TRACE(testing::Message() << "d " << p.d << " n " << p.n << " t " << p.t << " chunk " << chunk);
    Random random(7);
    const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * p.d * p.n);
    const Gradients g(p, grad_y, grad_final, threads, chunk);
    test::ScanReference r = p.reference;
    // Absent arguments still have gradients: at zero.
    if (r.delta_bias.empty()) r.delta_bias.assign(static_cast<size_t>(p.d), 0.0);
    if (r.initial_state.empty()) r.initial_state.assign(static_cast<size_t>(p.s * p.d * p.n), 0.0);
    auto loss = [&] {
        r.run();
        return std::inner_product(grad_y.begin(), grad_y.end(), r.y.begin(), 0.0) +
               std::inner_product(grad_final.begin(), grad_final.end(), r.final_state.begin(), 0.0);
    };
    const std::map<std::string, std::vector<double>*> arguments{{"u", &r.u},
                                                                {"delta", &r.delta},
                                                                {"A", &r.A},
                                                                {"B", &r.B},
                                                                {"C", &r.C},
                                                                {"D", &r.D},
                                                                {"z", &r.z},
                                                                {"delta_bias", &r.delta_bias},
                                                                {"initial_state", &r.initial_state}};
    for (const auto& [name, values] : g.v) {
        expect_close(values, test::finite_differences(*arguments.at(name), loss), 1e-5, name.c_str());
    }
}

TEST(SelectiveScanGradient, GradientsMatchFiniteDifferences) {
    check_gradients(Problem<float>(5, 4, {6}), 64);
    for (int64_t chunk : {1, 3, 4, 5}) check_gradients(Problem<float>(5, 3, {0, 4, 1, 5, 0}, 2), chunk);
    check_gradients(Problem<float>(17, 16, {7}, 1), 4, 2);
    check_gradients(Problem<float>(70, 1, {3, 2}), 2, 2);  // more than one group of channels
    for (int64_t n : {2, 7, 8, 11, 32}) check_gradients(Problem<float>(3, n, {5}), 2);
}

TEST(SelectiveScanGradient, GradientsWithoutOptionalArguments) {
    for (int bits = 0; bits < 32; ++bits) {
        const Flags flags{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
                          (bits & 16) != 0};
        check_gradients(Problem<float>(3, 2, {4, 2}, 0, flags), 3);
    }
}

TEST(SelectiveScanGradient, GradientsDoNotDependOnThreads) {
    const Problem<float> p(200, 16, {40, 0, 70});
    Random random(9);
    const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * p.d * p.n);
    const Gradients one(p, grad_y, grad_final, 1, 16);
    for (int threads : {2, 3}) {
        EXPECT_EQ(one.v, Gradients(p, grad_y, grad_final, threads, 16).v);
    }
    for (int64_t chunk : {1, 7, 64}) {
        for (const auto& [name, values] : Gradients(p, grad_y, grad_final, 2, chunk).v) {
            expect_close(values, one.v.at(name), 1e-5, name.c_str());
        }
    }
}

// What `set` names loses what its buffer held; the rest is added to.
TEST(SelectiveScanGradient, GradientsAreSetWhereAsked) {
    const Problem<float> p(20, 16, {9, 0, 5}, 1);
    Random random(9);
    const auto grad_y = random.vector(p.t * p.d), grad_final = random.vector(p.s * p.d * p.n);
    const Gradients added(p, grad_y, grad_final, 2, 4);
    const std::vector<std::string> names{"u", "delta", "B", "C", "z"};
    for (int which = 0; which < 5; ++which) {
        const SelectiveScanSet set{which == 0, which == 1, which == 2, which == 3, which == 4};
        for (const auto& [name, values] : Gradients(p, grad_y, grad_final, 2, 4, set).v) {
            const float lost = name == names[static_cast<size_t>(which)] ? test::kGradientStart : 0.0f;
            std::vector<double> expected;
            for (const float x : added.v.at(name)) expected.push_back(static_cast<double>(x - lost));
            expect_close(values, expected, 1e-6, name.c_str());
        }
    }
}

TEST(SelectiveScanNumerics, HoldsForExtremeSteps) {
    // dt from 1e-9 to 60, decays from 1 to 0 (exp underflows), 4096 tokens.
    Problem<float> p(16, 16, {4096});
    Random random(3);
    for (float& x : p.delta) x = random.uniform(-20.0f, 60.0f);
    for (float& x : p.A) x = -std::exp(random.uniform(-8.0f, 4.0f));
    p.fill_reference();
    check(p);
    Problem<float> slow(16, 16, {4096});  // decays just below 1: errors add up over thousands of tokens
    for (float& x : slow.delta) x = random.uniform(-9.0f, -6.0f);
    slow.fill_reference();
    check(slow);
}

// The golden file stores [b d l] and [b n l]; here time comes first.
std::vector<float> time_first(const test::GoldenTensor& g) {
    const int64_t b = g.shape[0], w = g.shape[1], l = g.shape[2];
    std::vector<float> out(g.values.size());
    for (int64_t i = 0; i < b; ++i) {
        for (int64_t j = 0; j < w; ++j) {
            for (int64_t k = 0; k < l; ++k) out[(i * l + k) * w + j] = g.values[(i * w + j) * l + k];
        }
    }
    return out;
}

struct Golden {
    std::map<std::string, test::GoldenTensor> file = test::read_golden(test::golden_op("selective_scan"));
    int64_t b = file.at("u").shape[0], d = file.at("u").shape[1], l = file.at("u").shape[2];
    int64_t n = file.at("A").shape[1], t = b * l;
    std::vector<int64_t> cu;
    std::map<std::string, std::vector<float>> v;
    SelectiveScanInputs<float> in;

    Golden() {
        for (int64_t i = 0; i <= b; ++i) cu.push_back(i * l);
        for (const auto& [name, tensor] : file) {
            const bool is_sequence = tensor.shape.size() == 3 && tensor.shape[2] == l;
            v[name] = is_sequence ? time_first(tensor) : tensor.values;
        }
        in.u = {v["u"].data(), {t, d}}, in.delta = {v["delta"].data(), {t, d}};
        in.A = {v["A"].data(), {d, n}}, in.B = {v["B"].data(), {t, n}}, in.C = {v["C"].data(), {t, n}};
        in.D = {v["D"].data(), {d}}, in.z = {v["z"].data(), {t, d}};
        in.delta_bias = {v["delta_bias"].data(), {d}}, in.initial_state = {v["h0"].data(), {b, d, n}};
        in.cu_seqlens = cu;
    }
};

TEST(SelectiveScanGolden, Forward) {
    if (test::golden_op("selective_scan").empty()) GTEST_SKIP() << "no golden file";
    const Golden g;
    for (auto mode : {TimeParallel::never, TimeParallel::always}) {
        auto y = test::nan_vector(g.t * g.d), final_state = test::nan_vector(g.b * g.d * g.n);
        selective_scan(make_cpu_exec(2), g.in, View<float, 2>(y.data(), {g.t, g.d}),
                       View<float, 3>(final_state.data(), {g.b, g.d, g.n}), {}, {.time_parallel = mode});
        expect_close(y, g.v.at("y"), 1e-6, "y");
        expect_close(final_state, g.v.at("h_last"), 1e-6, "h_last");
    }
}

TEST(SelectiveScanGolden, Backward) {
    if (test::golden_op("selective_scan").empty()) GTEST_SKIP() << "no golden file";
    const Golden g;
    const Exec ex = make_cpu_exec(2);
    const int64_t chunks = selective_scan_chunks(g.cu, 64);
    std::vector<float> y(static_cast<size_t>(g.t * g.d)), states(static_cast<size_t>(chunks * g.d * g.n));
    selective_scan(ex, g.in, View<float, 2>(y.data(), {g.t, g.d}), {},
                   View<float, 3>(states.data(), {chunks, g.d, g.n}), {.chunk = 64});
    std::map<std::string, std::vector<float>> grads;
    for (const char* name : {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0"}) {
        grads[name].assign(g.v.at(name).size(), test::kGradientStart);
    }
    SelectiveScanGradients<float> grad;
    grad.u = {grads["u"].data(), {g.t, g.d}}, grad.delta = {grads["delta"].data(), {g.t, g.d}};
    grad.A = {grads["A"].data(), {g.d, g.n}}, grad.D = {grads["D"].data(), {g.d}};
    grad.B = {grads["B"].data(), {g.t, g.n}}, grad.C = {grads["C"].data(), {g.t, g.n}};
    grad.z = {grads["z"].data(), {g.t, g.d}}, grad.delta_bias = {grads["delta_bias"].data(), {g.d}};
    grad.initial_state = {grads["h0"].data(), {g.b, g.d, g.n}};
    selective_scan_backward(ex, g.in, View<const float, 3>(states.data(), {chunks, g.d, g.n}),
                            View<const float, 2>(g.v.at("dy").data(), {g.t, g.d}),
                            View<const float, 3>(g.v.at("dh_last").data(), {g.b, g.d, g.n}), grad,
                            {.chunk = 64});
    for (const auto& [name, values] : grads) {
        expect_close(test::added(values), g.v.at("grad." + name), 1e-6, name.c_str());
    }
}

template <class F>
void expect_error(const std::string& message, F&& f) {
    try {
        f();
        FAIL() << "no error, expected: " << message;
    } catch (const Error& e) {
        EXPECT_EQ(e.what(), message);
    }
}

TEST(SelectiveScanErrors, NameTheArgument) {
    const Exec ex = make_cpu_exec(1);
    const Problem<float> p(4, 2, {3});
    std::vector<float> y(12), state(8);
    const View<float, 2> out(y.data(), {3, 4});
    auto call = [&](const SelectiveScanInputs<float>& in, const SelectiveScanOptions& options = {}) {
        selective_scan(ex, in, out, View<float, 3>(state.data(), {1, 4, 2}), {}, options);
    };
    auto in = p.inputs();
    in.A = {p.A.data(), {2, 4}};
    expect_error("[selective_scan] `A` must be [d n] = [4, 4] but is [2, 4]", [&] { call(in); });
    in = p.inputs(), in.B = {};
    expect_error("[selective_scan] `B` must be [t n] = [3, 2] but is absent", [&] { call(in); });
    in = p.inputs(), in.z = {p.z.data(), {2, 4}};
    expect_error("[selective_scan] `z` must be [t d] = [3, 4] but is [2, 4]", [&] { call(in); });
    const std::vector<int64_t> bad{0, 2};
    in = p.inputs(), in.cu_seqlens = bad;
    expect_error("[selective_scan] `cu_seqlens` must end at t = 3 but ends at 2", [&] { call(in); });
    expect_error("[selective_scan] `chunk` must be at least 1 but is 0",
                 [&] { call(p.inputs(), {.chunk = 0}); });
    expect_error("[selective_scan] `state` must be [s d n] = [3, 4, 2] but is [1, 4, 2]", [&] {
        selective_scan_step(ex, p.inputs(), View<float, 3>(state.data(), {1, 4, 2}), out);
    });
    expect_error("[selective_scan] `chunk_states` must be [chunks d n] = [1, 4, 2] but is absent", [&] {
        selective_scan_backward(ex, p.inputs(), {}, View<const float, 2>(y.data(), {3, 4}), {}, {});
    });
    in = p.inputs(), in.D = {};
    SelectiveScanGradients<float> grad;
    grad.D = {state.data(), {4}};
    expect_error("[selective_scan] `grad.D` is given but `D` is absent", [&] {
        selective_scan_backward(ex, in, View<const float, 3>(state.data(), {1, 4, 2}),
                                View<const float, 2>(y.data(), {3, 4}), {}, grad);
    });
    const Problem<bf16> rounded(4, 2, {3});
    const std::vector<bf16> grad_y(12);
    expect_error("[selective_scan] gradients of bf16 activations need a GPU", [&] {
        selective_scan_backward<bf16>(ex, rounded.inputs(), {state.data(), {1, 4, 2}},
                                      {grad_y.data(), {3, 4}}, {}, {});
    });
}

}  // namespace
}  // namespace ssm
