#include "ssm/ops/ssd/ssd.h"

#include <gtest/gtest.h>

#include "ssm/ops/ssd/ssd_test.h"
#include "tests/support/compare.h"
#include "tests/support/golden.h"
#include "tests/support/gradcheck.h"
#include "tests/support/shared.h"

namespace ssm {
namespace {

using namespace ssm::test;

// Where the processor multiplies pairs of bf16, x enters the state rounded to bf16 once more.
template <class T>
constexpr double kStateTolerance = std::is_same_v<T, float> ? 1e-5 : 3e-3;

template <class T>
void expect_reference(const SsdCase& c, int64_t chunk, uint64_t seed) {
    SsdArguments<T> arguments(c, random_ssd(c, seed));
    const Outputs<T> o = run<T>(c, arguments.inputs(), chunk);
    const SsdResult r = reference_ssd(c, arguments.values());
    expect_close(o.y, r.y, std::is_same_v<T, float> ? 1e-5 : 1e-2, "y");
    expect_close(o.final_state, r.final_state, kStateTolerance<T>, "final_state");
}

TEST(Ssd, MatchesReference) {
    constexpr int64_t kChunk = 32;
    for (SsdCase c : ssd_shapes()) {
        for (int64_t l : {int64_t{0}, int64_t{1}, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 7}) {
            c.cu_seqlens = {0, l};
            SCOPED_TRACE(fmt::format("h {} p {} g {} n {} l {}", c.h, c.p, c.g, c.n, l));
            expect_reference<float>(c, kChunk, 1);
            expect_reference<bf16>(c, kChunk, 2);
        }
    }
}

TEST(Ssd, SeveralSequences) {
    for (SsdCase c : ssd_shapes()) {
        c.cu_seqlens = {0, 0, 5, 5, 41, 42, 138, 138};
        SCOPED_TRACE(fmt::format("h {} p {} g {} n {}", c.h, c.p, c.g, c.n));
        expect_reference<float>(c, 16, 3);
        expect_reference<bf16>(c, 37, 4);
    }
}

// More chunks than one slab of scratch holds, sequences across its edges.
TEST(Ssd, ManySlabs) {
    SsdCase c{.h = 2, .p = 5, .g = 2, .n = 3};
    c.cu_seqlens = {0, 2, 9000, 9000, 9001, 20000, 20000};
    expect_reference<float>(c, 256, 5);
    c.initial_state = false;
    expect_reference<float>(c, 250, 6);
}

// Decays so strong that exp(l) underflows inside a chunk, and so weak that nothing decays.
TEST(Ssd, ExtremeDecays) {
    for (float A : {-1000.0f, -30.0f, -1e-6f}) {
        SsdCase c{.h = 2, .p = 16, .g = 1, .n = 16, .cu_seqlens = {0, 300}};
        SsdValues<float> v = random_ssd(c, 7);
        v.A = {A, 0.5f * A};
        SsdArguments<float> arguments(c, v);
        const Outputs<float> o = run<float>(c, arguments.inputs(), 128);
        const SsdResult r = reference_ssd(c, arguments.values());
        expect_close(o.y, r.y, 1e-5, "y");
        expect_close(o.final_state, r.final_state, 1e-5, "final_state");
    }
}

TEST(Ssd, EveryChunkSizeGivesTheSame) {
    SsdCase c{.h = 4, .p = 8, .g = 2, .n = 24, .cu_seqlens = {0, 70, 203}};
    SsdArguments<float> arguments(c, random_ssd(c, 8));
    const SsdResult r = reference_ssd(c, arguments.values());
    for (int64_t chunk : {1, 2, 5, 6, 7, 15, 16, 17, 64, 100, 128, 1000}) {
        const Outputs<float> o = run<float>(c, arguments.inputs(), chunk);
        SCOPED_TRACE(chunk);
        expect_close(o.y, r.y, 1e-5, "y");
        expect_close(o.final_state, r.final_state, 1e-5, "final_state");
    }
}

template <class T>
void expect_steps_fold(SsdCase c, double tolerance) {
    c.cu_seqlens = {0, 37};
    SsdArguments<T> arguments(c, random_ssd(c, 9));
    const SsdInputs<T> in = arguments.inputs();
    const Outputs<T> o = run<T>(c, in, 16);
    const SsdResult r = reference_ssd(c, arguments.values());
    std::vector<float> state(state_size(c), 0.0f);
    if (in.initial_state) state.assign(in.initial_state.data, in.initial_state.data + state_size(c));
    std::vector<T> y = nan_vector<T>(c.t() * c.h * c.p);
    const Exec ex = make_cpu_exec(2);
    for (int64_t t = 0; t < c.t(); ++t) {
        SsdInputs<T> one = in;
        one.x = {in.x.row(t), {1, c.h, c.p}};
        one.dt = {in.dt.row(t), {1, c.h}};
        one.B = {in.B.row(t), {1, c.g, c.n}};
        one.C = {in.C.row(t), {1, c.g, c.n}};
        one.cu_seqlens = {};
        one.initial_state = {};
        ssd_step<T>(ex, one, View<float, 4>(state.data(), {1, c.h, c.p, c.n}),
                    View<T, 3>(y.data() + t * c.h * c.p, {1, c.h, c.p}));
    }
    expect_close(y, r.y, tolerance, "steps");
    expect_close(o.y, r.y, tolerance, "sequence");
    expect_close(state, r.final_state, 1e-5, "state of steps");
    expect_close(o.final_state, to_double(state), kStateTolerance<T>, "state of sequence");
}

TEST(Ssd, StepsFoldToScan) {
    for (const SsdCase& c : ssd_shapes()) {
        SCOPED_TRACE(fmt::format("h {} p {} g {} n {}", c.h, c.p, c.g, c.n));
        expect_steps_fold<float>(c, 1e-5);
        expect_steps_fold<bf16>(c, 1e-2);
    }
}

// A step of many sequences equals one-token sequences, each with its own state; strided rows.
TEST(Ssd, StepOfSeveralSequences) {
    SsdCase c{.h = 4, .p = 7, .g = 2, .n = 19, .cu_seqlens = {0, 1, 2, 3}, .padding = 9};
    SsdArguments<float> arguments(c, random_ssd(c, 10));
    const SsdResult r = reference_ssd(c, arguments.values());
    const SsdInputs<float> in = arguments.inputs();
    const auto* initial = in.initial_state.data;
    std::vector<float> first;
    for (int threads : {1, 2, 5}) {  // one to four heads side by side, and what is left
        StridedRows<float> state(std::vector<float>(initial, initial + in.initial_state.size()), 3, 11);
        StridedRows<float> y(3, c.h * c.p, 2);
        ssd_step<float>(make_cpu_exec(threads), in, state.view<float, 4>({3, c.h, c.p, c.n}),
                        y.view<float, 3>({3, c.h, c.p}));
        EXPECT_TRUE(state.padding_intact() && y.padding_intact());
        expect_close(y.dense(), r.y, 1e-5, "y");
        expect_close(state.dense(), r.final_state, 1e-5, "state");
        if (first.empty()) first = y.dense();
        EXPECT_EQ(y.dense(), first);
    }
}

// The state entering each chunk, as the header says.
TEST(Ssd, ChunkStatesAreTheStatesEntering) {
    SsdCase c{.h = 2, .p = 5, .g = 1, .n = 6, .cu_seqlens = {0, 40}};
    SsdArguments<float> arguments(c, random_ssd(c, 11));
    const Outputs<float> o = run<float>(c, arguments.inputs(), 16);
    for (int64_t k = 0; k < 3; ++k) {
        SsdCase prefix = c;
        prefix.cu_seqlens = {0, 16 * k};
        const SsdResult r = reference_ssd(prefix, arguments.values());
        const auto at = o.chunk_states.begin() + k * state_size(c);
        expect_close(std::vector<float>(at, at + state_size(c)), r.final_state, 1e-5, "chunk state");
    }
}

void expect_gradients(const SsdCase& c, int64_t chunk, uint64_t seed, bool grad_final) {
    SCOPED_TRACE(fmt::format("h {} p {} g {} n {} chunk {}", c.h, c.p, c.g, c.n, chunk));
    SsdArguments<float> arguments(c, random_ssd(c, seed));
    Random random(seed + 1);
    const std::vector<float> grad_y = random.vector(c.t() * c.h * c.p);
    const std::vector<float> grad_state =
        grad_final ? random.vector(c.s() * state_size(c)) : std::vector<float>();
    const Outputs<float> o = run<float>(c, arguments.inputs(), chunk);
    const Gradients g = run_backward(c, arguments.inputs(), o.chunk_states, grad_y, grad_state, chunk);
    SsdValues<double> v = arguments.values();
    const auto loss = [&] {
        const SsdResult r = reference_ssd(c, v);
        double sum = 0;
        for (size_t i = 0; i < r.y.size(); ++i) sum += static_cast<double>(grad_y[i]) * r.y[i];
        for (size_t i = 0; i < grad_state.size(); ++i) {
            sum += static_cast<double>(grad_state[i]) * r.final_state[i];
        }
        return sum;
    };
    constexpr double kTolerance = 2e-5;
    expect_close(g.x, finite_differences(v.x, loss), kTolerance, "x");
    expect_close(g.dt, finite_differences(v.dt, loss), kTolerance, "dt");
    expect_close(g.A, finite_differences(v.A, loss), kTolerance, "A");
    expect_close(g.B, finite_differences(v.B, loss), kTolerance, "B");
    expect_close(g.C, finite_differences(v.C, loss), kTolerance, "C");
    expect_close(g.D, finite_differences(v.D, loss), kTolerance, "D");
    if (c.dt_bias) expect_close(g.dt_bias, finite_differences(v.dt_bias, loss), kTolerance, "dt_bias");
    if (c.initial_state) {
        expect_close(g.initial_state, finite_differences(v.initial_state, loss), kTolerance, "initial_state");
    }
}

TEST(Ssd, GradientsMatchFiniteDifferences) {
    const std::vector<int64_t> packed{0, 9, 9, 10, 31};
    expect_gradients({.h = 2, .p = 3, .g = 1, .n = 4, .cu_seqlens = packed}, 8, 20, true);
    expect_gradients({.h = 4, .p = 2, .g = 2, .n = 5, .cu_seqlens = packed, .D_width = 2, .padding = 3}, 7,
                     21, true);
    expect_gradients({.h = 3, .p = 5, .g = 3, .n = 2, .cu_seqlens = packed, .initial_state = false}, 100, 22,
                     false);
    expect_gradients({.h = 1, .p = 17, .g = 1, .n = 3, .cu_seqlens = {0, 37}, .dt_bias = false, .D_width = 0},
                     18, 23, true);
    expect_gradients({.h = 2, .p = 2, .g = 1, .n = 17, .cu_seqlens = {0, 21}, .dt_softplus = false}, 1, 24,
                     true);
    expect_gradients({.h = 1, .p = 2, .g = 1, .n = 200, .cu_seqlens = {0, 7}}, 4, 26, true);
    // Some time steps are outside the limits: no gradient passes.
    expect_gradients({.h = 2, .p = 2, .g = 1, .n = 3, .cu_seqlens = packed, .dt_min = 0.3f, .dt_max = 0.8f},
                     6, 25, true);
}

// At the real width, gradients of all chunk sizes agree with one token per chunk, whose formulas collapse.
TEST(Ssd, GradientsAreTheSameAtEveryChunkSize) {
    SsdCase c{.h = 4, .p = 64, .g = 2, .n = 128, .cu_seqlens = {0, 150, 213}};
    SsdArguments<float> arguments(c, random_ssd(c, 26));
    Random random(27);
    const std::vector<float> grad_y = random.vector(c.t() * c.h * c.p);
    const std::vector<float> grad_state = random.vector(c.s() * state_size(c));
    const auto gradients = [&](int64_t chunk, int threads) {
        const Outputs<float> o = run<float>(c, arguments.inputs(), chunk);
        return run_backward(c, arguments.inputs(), o.chunk_states, grad_y, grad_state, chunk, threads);
    };
    const Gradients one = gradients(1, 2);
    for (int64_t chunk : {16, 50, 64, 128}) {
        SCOPED_TRACE(chunk);
        const Gradients g = gradients(chunk, 2);
        expect_close(g.x, one.x, 1e-5, "x");
        expect_close(g.dt, one.dt, 3e-5, "dt");  // differences of sums over the chunk: 1.1e-5 measured at 128
        expect_close(g.A, one.A, 3e-5, "A");
        expect_close(g.B, one.B, 1e-5, "B");
        expect_close(g.C, one.C, 1e-5, "C");
        expect_close(g.D, one.D, 1e-5, "D");
        expect_close(g.dt_bias, one.dt_bias, 3e-5, "dt_bias");
        expect_close(g.initial_state, one.initial_state, 1e-5, "initial_state");
    }
}

// What `set` names loses what its buffer held; the rest is added to.
TEST(Ssd, GradientsAreSetWhereAsked) {
    const SsdCase c{.h = 4, .p = 20, .g = 2, .n = 24, .cu_seqlens = {0, 50, 93}, .D_width = 20};
    SsdArguments<float> arguments(c, random_ssd(c, 28));
    const std::vector<float> grad_y = Random(29).vector(c.t() * c.h * c.p);
    const Outputs<float> o = run<float>(c, arguments.inputs(), 32);
    const auto gradients = [&](SsdSet set) {
        const Gradients g = run_backward(c, arguments.inputs(), o.chunk_states, grad_y, {}, 32, 2, set);
        return std::array<std::vector<float>, 5>{g.x, g.dt, g.B, g.C, g.A};
    };
    const auto all_added = gradients({});
    for (size_t which = 0; which < 4; ++which) {
        const auto got = gradients({which == 0, which == 1, which == 2, which == 3});
        for (size_t i = 0; i < got.size(); ++i) {
            SCOPED_TRACE(fmt::format("set {}, gradient {}", which, i));
            std::vector<float> expected = all_added[i];
            for (float& v : expected) v -= i == which ? kGradientStart : 0.0f;
            expect_close(got[i], to_double(expected), 1e-6, "gradient");
        }
    }
}

TEST(Ssd, Bf16OnAnyNumberOfThreads) {
    const SsdCase c{.h = 4, .p = 24, .g = 2, .n = 41, .cu_seqlens = {0, 150, 171, 313}};
    SsdArguments<bf16> arguments(c, random_ssd(c, 35));
    const auto bits = [](const std::vector<bf16>& y) { return std::vector<float>(y.begin(), y.end()); };
    const Outputs<bf16> one = run<bf16>(c, arguments.inputs(), 64, 1);
    for (int threads : {2, 3, 7}) {
        const Outputs<bf16> many = run<bf16>(c, arguments.inputs(), 64, threads);
        EXPECT_EQ(bits(one.y), bits(many.y));
        EXPECT_EQ(one.final_state, many.final_state);
    }
}

template <class T>
void expect_zero_state_is_none() {
    const SsdCase c{.h = 2, .p = 17, .g = 1, .n = 33, .cu_seqlens = {0, 40, 40, 61}};
    SsdArguments<T> arguments(c, random_ssd(c, 36));
    SsdInputs<T> in = arguments.inputs();
    std::vector<float> state(c.s() * state_size(c), 0.0f);
    in.initial_state = {state.data(), {c.s(), c.h, c.p, c.n}};
    const Outputs<T> zero = run<T>(c, in, 16);
    in.initial_state = {};
    EXPECT_EQ(zero.final_state, run<T>(c, in, 16).final_state);
    in.initial_state = {state.data(), {c.s(), c.h, c.p, c.n}};
    state[state_size(c) - 1] = 1.0f;  // one element of the first sequence's last head
    EXPECT_NE(zero.final_state, run<T>(c, in, 16).final_state);
}

TEST(Ssd, ZeroStateIsNoState) {
    expect_zero_state_is_none<float>();
    expect_zero_state_is_none<bf16>();
}

TEST(Ssd, ThreadsDoNotChangeABit) {
    SsdCase c{.h = 4, .p = 24, .g = 2, .n = 40, .cu_seqlens = {0, 150, 170, 313}};
    SsdArguments<float> arguments(c, random_ssd(c, 30));
    Random random(31);
    const std::vector<float> grad_y = random.vector(c.t() * c.h * c.p);
    const Outputs<float> one = run<float>(c, arguments.inputs(), 64, 1);
    const Gradients g1 = run_backward(c, arguments.inputs(), one.chunk_states, grad_y, {}, 64, 1);
    for (int threads : {2, 3, 7}) {
        const Outputs<float> many = run<float>(c, arguments.inputs(), 64, threads);
        EXPECT_EQ(one.y, many.y);
        EXPECT_EQ(one.final_state, many.final_state);
        EXPECT_EQ(one.chunk_states, many.chunk_states);
        const Gradients g = run_backward(c, arguments.inputs(), one.chunk_states, grad_y, {}, 64, threads);
        EXPECT_EQ(g1.x, g.x);
        EXPECT_EQ(g1.dt, g.dt);
        EXPECT_EQ(g1.A, g.A);
        EXPECT_EQ(g1.B, g.B);
        EXPECT_EQ(g1.C, g.C);
        EXPECT_EQ(g1.D, g.D);
        EXPECT_EQ(g1.initial_state, g.initial_state);
    }
}

// A document gives the same bytes alone and packed among others.
TEST(Ssd, SequencesDoNotSeeEachOther) {
    SsdCase c{.h = 2, .p = 16, .g = 1, .n = 8, .cu_seqlens = {0, 33, 90, 120}, .initial_state = false};
    SsdArguments<float> arguments(c, random_ssd(c, 32));
    const Outputs<float> all = run<float>(c, arguments.inputs(), 32);
    SsdCase alone = c;
    alone.cu_seqlens = {0, 57};
    SsdInputs<float> in = arguments.inputs();
    in.x = {in.x.row(33), {57, c.h, c.p}, in.x.stride};
    in.dt = {in.dt.row(33), {57, c.h}, in.dt.stride};
    in.B = {in.B.row(33), {57, c.g, c.n}, in.B.stride};
    in.C = {in.C.row(33), {57, c.g, c.n}, in.C.stride};
    in.cu_seqlens = alone.cu_seqlens;
    const Outputs<float> one = run<float>(alone, in, 32);
    const auto y = all.y.begin() + 33 * c.h * c.p;
    EXPECT_EQ(one.y, std::vector<float>(y, y + 57 * c.h * c.p));
}

// Absent gradients, outputs and states are not touched and change nothing else.
TEST(Ssd, AbsentOutputs) {
    SsdCase c{.h = 2, .p = 6, .g = 1, .n = 8, .cu_seqlens = {0, 50}};
    SsdArguments<float> arguments(c, random_ssd(c, 33));
    const Outputs<float> o = run<float>(c, arguments.inputs(), 16);
    std::vector<float> y = nan_vector(c.t() * c.h * c.p);
    const Exec ex = make_cpu_exec(2);
    ssd<float>(ex, arguments.inputs(), View<float, 3>(y.data(), {c.t(), c.h, c.p}), {}, {}, {.chunk = 16});
    EXPECT_EQ(y, o.y);
    const std::vector<float> grad_y = Random(34).vector(c.t() * c.h * c.p);
    const Gradients all = run_backward(c, arguments.inputs(), o.chunk_states, grad_y, {}, 16);
    std::vector<float> grad_A(c.h, kGradientStart);
    SsdGradients<float> only;
    only.A = {grad_A.data(), {c.h}};
    ssd_backward<float>(ex, arguments.inputs(),
                        View<const float, 4>(o.chunk_states.data(), {4, c.h, c.p, c.n}),
                        View<const float, 3>(grad_y.data(), {c.t(), c.h, c.p}), {}, only, {.chunk = 16});
    EXPECT_EQ(added(grad_A), all.A);
}

TEST(Ssd, Golden) {
    const std::filesystem::path path = golden_op("ssd");
    ASSERT_FALSE(path.empty()) << "tests/golden/ops/ssd.safetensors is part of the checkout";
    auto f = read_golden(path);
    const auto& shape = f.at("x").shape;  // [b l h p]
    SsdCase c{.h = shape[2], .p = shape[3], .g = f.at("B").shape[2], .n = f.at("B").shape[3]};
    c.cu_seqlens.clear();
    for (int64_t b = 0; b <= shape[0]; ++b) c.cu_seqlens.push_back(b * shape[1]);
    c.dt_bias = c.dt_softplus = false;
    const SsdValues<float> v{f.at("x").values,
                             f.at("dt").values,
                             f.at("A").values,
                             f.at("B").values,
                             f.at("C").values,
                             f.at("D").values,
                             {},
                             f.at("h0").values};
    SsdArguments<float> arguments(c, v);
    for (int64_t chunk : {1, 32, 64, 128}) {
        SCOPED_TRACE(chunk);
        const Outputs<float> o = run<float>(c, arguments.inputs(), chunk);
        expect_close(o.y, f.at("y").values, 1e-5, "y");
        expect_close(o.final_state, f.at("h_last").values, 1e-5, "h_last");
        const Gradients g = run_backward(c, arguments.inputs(), o.chunk_states, f.at("dy").values,
                                         f.at("dh_last").values, chunk);
        expect_close(g.x, f.at("grad.x").values, 1e-5, "x");
        expect_close(g.dt, f.at("grad.dt").values, 1e-5, "dt");
        expect_close(g.A, f.at("grad.A").values, 1e-5, "A");
        expect_close(g.B, f.at("grad.B").values, 1e-5, "B");
        expect_close(g.C, f.at("grad.C").values, 1e-5, "C");
        expect_close(g.D, f.at("grad.D").values, 1e-5, "D");
        expect_close(g.initial_state, f.at("grad.h0").values, 1e-5, "h0");
    }
}

std::string message_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "no error";
}

class SsdErrors : public testing::Test {
protected:
    SsdCase c_{.h = 4, .p = 3, .g = 2, .n = 5, .cu_seqlens = {0, 6}};
    SsdArguments<float> arguments_{c_, random_ssd(c_, 40)};
    SsdInputs<float> in_ = arguments_.inputs();
    std::vector<float> y_ = nan_vector(6 * 4 * 3), state_ = nan_vector(4 * 3 * 5);
    View<float, 3> y_view_{y_.data(), {6, 4, 3}};
    View<float, 4> state_view_{state_.data(), {1, 4, 3, 5}};

    std::string forward(int64_t chunk = 4) {
        return message_of(
            [&] { ssd<float>(make_cpu_exec(1), in_, y_view_, state_view_, {}, {.chunk = chunk}); });
    }
};

TEST_F(SsdErrors, Forward) {
    EXPECT_EQ(forward(), "no error");
    EXPECT_EQ(forward(0), "[ssd] `chunk` must be positive but is 0");
    in_.dt.shape = {6, 3};
    EXPECT_EQ(forward(), "[ssd] `dt` must be [t h] = [6, 4] but is [6, 3]");
    in_ = arguments_.inputs();
    in_.C.shape = {6, 1, 5};
    EXPECT_EQ(forward(), "[ssd] `C` must be [t g n] = [6, 2, 5] but is [6, 1, 5]");
    in_ = arguments_.inputs();
    in_.B.shape = {6, 3, 5};
    EXPECT_EQ(forward(), "[ssd] the number of groups g = 3 does not divide the number of heads h = 4");
    in_ = arguments_.inputs();
    in_.A = {};
    EXPECT_EQ(forward(), "[ssd] `A` must be [h] = [4] but is absent");
    in_ = arguments_.inputs();
    in_.D.shape = {4, 2};
    EXPECT_EQ(forward(), "[ssd] `D` must be [h p] = [4, 3] but is [4, 2]");
    in_ = arguments_.inputs();
    in_.initial_state.shape = {2, 4, 3, 5};
    EXPECT_EQ(forward(), "[ssd] `initial_state` must be [s h p n] = [1, 4, 3, 5] but is [2, 4, 3, 5]");
    in_ = arguments_.inputs();
    in_.dt_min = 2.0f;
    in_.dt_max = 1.0f;
    EXPECT_EQ(forward(), "[ssd] dt_min = 2 is above dt_max = 1");
    in_ = arguments_.inputs();
    const std::vector<int64_t> wrong{0, 5};
    in_.cu_seqlens = wrong;
    EXPECT_EQ(forward(), "[ssd] `cu_seqlens` must end at t = 6 but ends at 5");
    in_ = arguments_.inputs();
    y_view_.shape = {5, 4, 3};
    EXPECT_EQ(forward(), "[ssd] `y` must be [t h p] = [6, 4, 3] but is [5, 4, 3]");
}

TEST_F(SsdErrors, BackwardAndStep) {
    std::vector<float> states = nan_vector(2 * 4 * 3 * 5), gradient = nan_vector(64);
    View<const float, 4> states_view{states.data(), {2, 4, 3, 5}};
    View<const float, 3> grad_y{y_.data(), {6, 4, 3}};
    SsdGradients<float> grad;
    const auto backward = [&] {
        return message_of(
            [&] { ssd_backward<float>(make_cpu_exec(1), in_, states_view, grad_y, {}, grad, {.chunk = 4}); });
    };
    states_view.shape[0] = 1;
    EXPECT_EQ(backward(),
              "[ssd_backward] `chunk_states` must be [chunks h p n] = [2, 4, 3, 5] but is [1, 4, 3, 5]");
    states_view.shape[0] = 2;
    grad.A = {gradient.data(), {3}};
    EXPECT_EQ(backward(), "[ssd_backward] `grad.A` must be [h] = [4] but is [3]");
    grad.A = {};
    grad.D = {gradient.data(), {4, 1}};
    in_.D = {};
    EXPECT_EQ(backward(), "[ssd_backward] `grad.D` is given but `D` is absent");
    in_ = arguments_.inputs();
    EXPECT_EQ(message_of([&] { ssd_step<float>(make_cpu_exec(1), in_, state_view_, y_view_); }),
              "[ssd_step] `state` must be [s h p n] = [6, 4, 3, 5] but is [1, 4, 3, 5]");
    SsdArguments<bf16> rounded(c_, random_ssd(c_, 1));
    const std::vector<bf16> rounded_grad_y(6 * 4 * 3);
    EXPECT_EQ(message_of([&] {
                  ssd_backward<bf16>(make_cpu_exec(1), rounded.inputs(), states_view,
                                     View<const bf16, 3>(rounded_grad_y.data(), {6, 4, 3}), {}, {},
                                     {.chunk = 4});
              }),
              "[ssd_backward] gradients of bf16 activations need a GPU");
}

TEST_F(SsdErrors, NoKernelForThatDevice) {
    if (kHasCuda) GTEST_SKIP() << "this build has CUDA kernels";
    Exec ex = make_cpu_exec(1);
    ex.device = Device::cuda;
    EXPECT_EQ(message_of([&] { ssd<float>(ex, in_, y_view_, state_view_, {}, {}); }),
              "[ssd] this build has no CUDA kernels");
}

}  // namespace
}  // namespace ssm
