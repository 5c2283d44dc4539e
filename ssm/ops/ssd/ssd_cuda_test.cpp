// The CUDA kernels against the f64 reference and the CPU operator; outputs start as NaN, gradients at
// kGradientStart; rows lie apart and begin at odd addresses where the case has padding.
#include <gtest/gtest.h>

#include <algorithm>

#include "ssm/ops/ssd/ssd_test.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

using namespace ssm::test;

// A view of host memory as one of the device's, its row stride kept, and its misalignment where rows lie
// an odd width apart.
class Mover {
public:
    explicit Mover(const SsdCase& c) : aligned_(c.padding % 8 == 0) {}
    template <class T, int R>
    View<T, R> operator()(const View<T, R>& v) {
        using Plain = std::remove_const_t<T>;
        if (!v) return v;
        const int64_t rows = v.shape[0], row = v.row_size(), count = rows ? (rows - 1) * v.stride + row : 0;
        const int64_t odd =
            aligned_ ? 0 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data) / sizeof(T) % 8);
        std::vector<Plain> values(static_cast<size_t>(odd + count), static_cast<Plain>(NAN));
        for (int64_t i = 0; i < rows; ++i)
            std::copy(v.row(i), v.row(i) + row, values.begin() + odd + i * v.stride);
        tensors_.push_back(on_device(values, {odd + count}));
        return {reinterpret_cast<T*>(tensors_.back().raw()) + odd, v.shape, v.stride};
    }
    // All that belongs to a moved view, to the same view of host memory.
    template <class T, int R>
    void back(const View<T, R>& there, const View<T, R>& here) {
        for (const Tensor& t : tensors_) {
            const auto* const base = reinterpret_cast<const T*>(t.raw());
            const auto* const at = reinterpret_cast<const std::byte*>(there.data);
            if (at < t.raw() || at >= t.raw() + t.bytes()) continue;
            const std::vector<T> values = from_device<T>(t);
            std::copy(values.begin() + (there.data - base), values.end(), here.data);
        }
    }

private:
    bool aligned_;
    std::vector<Tensor> tensors_;
};

template <class T>
SsdInputs<T> moved(Mover& move, SsdInputs<T> in) {
    in.x = move(in.x);
    in.dt = move(in.dt);
    in.A = move(in.A);
    in.B = move(in.B);
    in.C = move(in.C);
    in.D = move(in.D);
    in.dt_bias = move(in.dt_bias);
    in.initial_state = move(in.initial_state);
    return in;
}

template <class T>
Outputs<T> run_cuda(const SsdCase& c, SsdInputs<T> in, int64_t chunk) {
    Mover move(c);
    in = moved(move, in);
    StridedRows<T> y(c.t(), c.h * c.p, c.padding);
    const int64_t chunks = ssd_chunks(c.cu_seqlens, chunk);
    Outputs<T> o{{}, nan_vector(c.s() * state_size(c)), nan_vector(chunks * state_size(c))};
    const auto y_here = y.template view<T, 3>({c.t(), c.h, c.p});
    const View<float, 4> final_here(o.final_state.data(), {c.s(), c.h, c.p, c.n}),
        chunks_here(o.chunk_states.data(), {chunks, c.h, c.p, c.n});
    const auto y_there = move(y_here);
    const View<float, 4> final_there = move(final_here), chunks_there = move(chunks_here);
    ssd<T>(cuda_exec(), in, y_there, final_there, chunks_there, {.chunk = chunk});
    move.back(y_there, y_here);
    move.back(final_there, final_here);
    move.back(chunks_there, chunks_here);
    EXPECT_TRUE(y.padding_intact());
    o.y = y.dense();
    return o;
}

std::vector<SsdCase> shapes() {
    std::vector<SsdCase> all = ssd_shapes();
    all.push_back({.h = 2, .p = 129, .g = 2, .n = 127, .D_width = 129, .padding = 8});
    all.push_back({.h = 4, .p = 64, .g = 1, .n = 64, .D_width = 64, .padding = 16});
    return all;
}

std::string name_of(const SsdCase& c) { return fmt::format("h {} p {} g {} n {}", c.h, c.p, c.g, c.n); }

template <class T>
void expect_reference(const SsdCase& c, int64_t chunk, uint64_t seed) {
    SsdArguments<T> arguments(c, random_ssd(c, seed));
    const Outputs<T> o = run_cuda<T>(c, arguments.inputs(), chunk),
                     on_cpu = run<T>(c, arguments.inputs(), chunk);
    const SsdResult r = reference_ssd(c, arguments.values());
    constexpr bool kExact = std::is_same_v<T, float>;
    expect_close(o.y, r.y, kExact ? 1e-5 : 1e-2, "y");
    expect_close(o.final_state, r.final_state, kExact ? 1e-5 : 3e-3, "final_state");
    expect_close(o.chunk_states, to_double(on_cpu.chunk_states), kExact ? 1e-5 : 5e-3, "chunk_states");
}

TEST(SsdCuda, MatchesReference) {
    for (SsdCase c : shapes()) {
        for (const int64_t l : {0, 1, 31, 63, 64, 65, 200}) {
            c.cu_seqlens = {0, l};
            SCOPED_TRACE(name_of(c) + fmt::format(" l {}", l));
            expect_reference<float>(c, 64, 1);
            expect_reference<bf16>(c, 64, 2);
        }
    }
}

TEST(SsdCuda, SeveralSequencesAndChunkSizes) {
    for (SsdCase c : shapes()) {
        c.cu_seqlens = {0, 0, 5, 5, 41, 42, 198, 198};
        for (const int64_t chunk : {1, 16, 37, 64, 100, 1000}) {
            SCOPED_TRACE(name_of(c) + fmt::format(" chunk {}", chunk));
            expect_reference<float>(c, chunk, 3);
            expect_reference<bf16>(c, chunk, 4);
        }
    }
}

// More sequences than fit a kernel's parameters.
TEST(SsdCuda, ManySequences) {
    SsdCase c{.h = 2, .p = 5, .g = 2, .n = 3};
    for (int64_t i = 0; i < 100; ++i) c.cu_seqlens.push_back(c.cu_seqlens.back() + i % 7);
    expect_reference<float>(c, 4, 5);
}

TEST(SsdCuda, ExtremeDecays) {
    for (const float A : {-1000.0f, -30.0f, -1e-6f}) {
        SsdCase c{.h = 2, .p = 16, .g = 1, .n = 16, .cu_seqlens = {0, 300}};
        SsdValues<float> v = random_ssd(c, 7);
        v.A = {A, 0.5f * A};
        SsdArguments<float> arguments(c, v);
        const Outputs<float> o = run_cuda<float>(c, arguments.inputs(), 128);
        const SsdResult r = reference_ssd(c, arguments.values());
        expect_close(o.y, r.y, 1e-5, "y");
        expect_close(o.final_state, r.final_state, 1e-5, "final_state");
    }
}

// A step of several sequences equals one-token sequences, each with its own state.
template <class T, class S = float>
void expect_step(SsdCase c, int64_t sequences = 3) {
    SCOPED_TRACE(name_of(c) + fmt::format(" sequences {}", sequences));
    c.cu_seqlens.clear();
    for (int64_t s = 0; s <= sequences; ++s) c.cu_seqlens.push_back(s);
    c.initial_state = true;
    SsdValues<float> v = random_ssd(c, 10);
    for (float& x : v.initial_state) x = static_cast<float>(static_cast<S>(x));
    SsdArguments<T> arguments(c, v);
    const SsdResult r = reference_ssd(c, arguments.values());
    const SsdInputs<T> in = arguments.inputs();
    const auto* initial = in.initial_state.data;
    StridedRows<S> state(std::vector<S>(initial, initial + in.initial_state.size()), sequences, c.padding);
    StridedRows<T> y(sequences, c.h * c.p, c.padding);
    Mover move(c);
    const auto state_here = state.template view<S, 4>({sequences, c.h, c.p, c.n}),
               state_there = move(state_here);
    const auto y_here = y.template view<T, 3>({sequences, c.h, c.p}), y_there = move(y_here);
    ssd_step<T>(cuda_exec(), moved(move, in), state_there, y_there);
    move.back(state_there, state_here);
    move.back(y_there, y_here);
    EXPECT_TRUE(state.padding_intact() && y.padding_intact());
    expect_close(y.dense(), r.y, std::is_same_v<T, float> ? 1e-5 : 1e-2, "y");
    expect_close(state.dense(), r.final_state, std::is_same_v<S, float> ? 1e-5 : 3e-3, "state");
}

TEST(SsdCuda, Step) {
    for (const SsdCase& c : shapes()) {
        expect_step<float>(c);
        expect_step<bf16>(c);
        expect_step<float, bf16>(c);
        expect_step<bf16, bf16>(c);
    }
    for (const int64_t n : {16, 32, 64, 128, 256}) {
        for (const int64_t p : {5, 16, 64}) {
            const SsdCase c{.h = 4, .p = p, .g = 2, .n = n};
            expect_step<float>(c);
            expect_step<bf16>(c);
            expect_step<float, bf16>(c);
            expect_step<bf16, bf16>(c);
        }
    }
}

// As many as fill a GPU, whose last rows of a head are fewer than a warp takes.
TEST(SsdCuda, StepOfManySequences) {
    for (const int64_t n : {64, 128}) {
        const SsdCase c{.h = 24, .p = 21, .g = 1, .n = n};
        expect_step<float>(c, 128);
        expect_step<bf16, bf16>(c, 128);
    }
}

// Slots: the states of a larger pool, in another order; the others stay.
TEST(SsdCuda, StepInSlots) {
    const Exec& ex = cuda_exec();
    for (const int64_t n : {3, 64, 128}) {
        const int64_t s = 40, pool = 64, h = 6, p = 9;
        std::vector<int32_t> slots;
        for (int64_t i = 0; i < s; ++i) slots.push_back(static_cast<int32_t>((37 * i + 4) % pool));
        Random random(3);
        const Tensor x = on_device(random.vector(s * h * p), {s, h, p}),
                     dt = on_device(random.vector(s * h), {s, h}),
                     A = on_device(random.vector(h, -1.0f, 0.0f), {h}),
                     B = on_device(random.vector(s * n), {s, 1, n}),
                     C = on_device(random.vector(s * n), {s, 1, n}),
                     all = on_device(random.vector(pool * h * p * n), {pool, h, p, n}),
                     there = on_device(slots, {s}), y = Tensor::empty(ex, {s, h, p}),
                     want = Tensor::empty(ex, {s, h, p}), dense = Tensor::empty(ex, {s, h, p, n});
        const std::vector<float> before = from_device<float>(all);
        for (int64_t i = 0; i < s; ++i)
            dense.rows(i, i + 1).copy_from(
                all.rows(slots[static_cast<size_t>(i)], slots[static_cast<size_t>(i)] + 1));
        SsdInputs<float> in{x.view<const float, 3>(), dt.view<const float, 2>(), A.view<const float, 1>(),
                            B.view<const float, 3>(), C.view<const float, 3>()};
        ssd_step<float>(ex, in, dense.view<float, 4>(), want.view<float, 3>());
        in.slots = there.view<const int32_t, 1>();
        ssd_step<float>(ex, in, all.view<float, 4>(), y.view<float, 3>());
        EXPECT_EQ(from_device<float>(y), from_device<float>(want));
        for (int64_t slot = 0; slot < pool; ++slot) {
            const auto at = std::ranges::find(slots, slot);
            const auto now = from_device<float>(all.rows(slot, slot + 1));
            if (at == slots.end()) {
                EXPECT_TRUE(std::equal(now.begin(), now.end(), before.begin() + slot * h * p * n));
            } else {
                EXPECT_EQ(now, from_device<float>(dense.rows(at - slots.begin(), at - slots.begin() + 1)));
            }
        }
    }
}

// A gradient with the case's padding behind its rows: what is written has to be, so it starts as NaN.
template <class T>
StridedRows<T> start_rows(const SsdCase& c, int64_t width, bool set) {
    return {std::vector<T>(static_cast<size_t>(c.t() * width), static_cast<T>(set ? NAN : kGradientStart)),
            c.t(), c.padding};
}
template <class T>
std::vector<float> result_rows(const StridedRows<T>& rows, bool set) {
    EXPECT_TRUE(rows.padding_intact());
    const std::vector<T> dense = rows.dense();
    const std::vector<float> values(dense.begin(), dense.end());
    return set ? values : added(values);
}

template <class T>
Gradients run_backward_cuda(const SsdCase& c, const SsdInputs<T>& host,
                            const std::vector<float>& chunk_states, const std::vector<T>& grad_y,
                            const std::vector<float>& grad_final, int64_t chunk, SsdSet set) {
    Mover move(c);
    const SsdInputs<T> in = moved(move, host);
    const auto start = [](int64_t count) {
        return std::vector<float>(static_cast<size_t>(count), kGradientStart);
    };
    auto x = start_rows<T>(c, c.h * c.p, set.x), dt = start_rows<T>(c, c.h, set.dt),
         B = start_rows<T>(c, c.g * c.n, set.B), C = start_rows<T>(c, c.g * c.n, set.C);
    Gradients g{{}, {}, start(c.h), {}, {}, start(c.h * c.D_width), start(c.h), start(c.s() * state_size(c))};
    SsdGradients<T> here;
    here.x = x.template view<T, 3>({c.t(), c.h, c.p});
    here.dt = dt.template view<T, 2>({c.t(), c.h});
    here.A = {g.A.data(), {c.h}};
    here.B = B.template view<T, 3>({c.t(), c.g, c.n});
    here.C = C.template view<T, 3>({c.t(), c.g, c.n});
    if (c.D_width > 0) here.D = {g.D.data(), {c.h, c.D_width}};
    if (c.dt_bias) here.dt_bias = {g.dt_bias.data(), {c.h}};
    here.initial_state = {g.initial_state.data(), {c.s(), c.h, c.p, c.n}};
    const SsdGradients<T> v{move(here.x), move(here.dt), move(here.A),       move(here.B),
                            move(here.C), move(here.D),  move(here.dt_bias), move(here.initial_state),
                            set};
    View<const float, 4> grad_state;
    if (!grad_final.empty()) grad_state = {grad_final.data(), {c.s(), c.h, c.p, c.n}};
    const View<const float, 4> states(chunk_states.data(), {ssd_chunks(c.cu_seqlens, chunk), c.h, c.p, c.n});
    StridedRows<T> gy(grad_y, c.t(), c.padding);
    ssd_backward<T>(cuda_exec(), in, move(states), move(gy.template view<const T, 3>({c.t(), c.h, c.p})),
                    move(grad_state), v, {.chunk = chunk});
    move.back(v.x, here.x);
    move.back(v.dt, here.dt);
    move.back(v.A, here.A);
    move.back(v.B, here.B);
    move.back(v.C, here.C);
    move.back(v.D, here.D);
    move.back(v.dt_bias, here.dt_bias);
    move.back(v.initial_state, here.initial_state);
    for (std::vector<float>* f : {&g.A, &g.D, &g.dt_bias, &g.initial_state}) *f = added(std::move(*f));
    g.x = result_rows(x, set.x);
    g.dt = result_rows(dt, set.dt);
    g.B = result_rows(B, set.B);
    g.C = result_rows(C, set.C);
    return g;
}

// What the arguments say after rounding to T, for the operator on the CPU, whose gradients are f32.
template <class T>
SsdValues<float> widened(const SsdArguments<T>& arguments, SsdValues<float> v) {
    const SsdValues<double> rounded = arguments.values();
    v.x.assign(rounded.x.begin(), rounded.x.end());
    v.dt.assign(rounded.dt.begin(), rounded.dt.end());
    v.B.assign(rounded.B.begin(), rounded.B.end());
    v.C.assign(rounded.C.begin(), rounded.C.end());
    return v;
}

template <class T>
void expect_gradients(const SsdCase& c, int64_t chunk, uint64_t seed, bool grad_final, SsdSet set = {}) {
    SCOPED_TRACE(name_of(c) + fmt::format(" chunk {} of {}, {} bytes", chunk, c.t(), sizeof(T)));
    const SsdValues<float> values = random_ssd(c, seed);
    SsdArguments<T> arguments(c, values);
    SsdArguments<float> wide(c, widened(arguments, values));
    Random random(seed + 1);
    const std::vector<T> grad_y = random.vector<T>(c.t() * c.h * c.p);
    const std::vector<float> grad_state =
                                 grad_final ? random.vector(c.s() * state_size(c)) : std::vector<float>(),
                             wide_grad_y(grad_y.begin(), grad_y.end());
    const Outputs<float> o = run<float>(c, wide.inputs(), chunk);
    const SsdInputs<T> in = arguments.inputs();
    const Gradients g = run_backward_cuda<T>(c, in, o.chunk_states, grad_y, grad_state, chunk, set);
    const Gradients r = run_backward(c, wide.inputs(), o.chunk_states, wide_grad_y, grad_state, chunk);
    // grad A and grad dt_bias sum terms of both signs over all time: of bf16's errors more remains.
    constexpr bool kExact = std::is_same_v<T, float>;
    constexpr double kTolerance = kExact ? 1e-4 : 2e-2, kSums = kExact ? 1e-4 : 5e-2;
    // What is added at kGradientStart is rounded there, and grad dt may be small beside it.
    const double kAdded = kExact || set.dt ? kTolerance : 5e-2;
    expect_close(g.x, to_double(r.x), kTolerance, "x");
    expect_close(g.dt, to_double(r.dt), kAdded, "dt");
    expect_close(g.A, to_double(r.A), kSums, "A");
    expect_close(g.B, to_double(r.B), kTolerance, "B");
    expect_close(g.C, to_double(r.C), kTolerance, "C");
    expect_close(g.D, to_double(r.D), kTolerance, "D");
    expect_close(g.dt_bias, to_double(r.dt_bias), kSums, "dt_bias");
    expect_close(g.initial_state, to_double(r.initial_state), kTolerance, "initial_state");
    const Gradients again = run_backward_cuda<T>(c, in, o.chunk_states, grad_y, grad_state, chunk, set);
    EXPECT_TRUE(again.B == g.B && again.C == g.C && again.A == g.A && again.D == g.D && again.dt == g.dt &&
                again.dt_bias == g.dt_bias && again.x == g.x);
}

TEST(SsdCuda, Gradients) {
    constexpr SsdSet kAll{true, true, true, true};
    for (SsdCase c : shapes()) {
        for (const int64_t l : {2, 63, 64, 65, 300}) {
            c.cu_seqlens = {0, l};
            expect_gradients<float>(c, 64, 20, l != 63, l == 65 ? kAll : SsdSet{});
            expect_gradients<bf16>(c, 64, 21, l != 64, l == 65 ? kAll : SsdSet{});
        }
        c.cu_seqlens = {0, 9, 9, 10, 180, 180};
        for (const int64_t chunk : {8, 64, 100}) {
            expect_gradients<float>(c, chunk, 22, true);
            expect_gradients<bf16>(c, chunk, 23, true, kAll);
        }
    }
}

// Each flag alone; a problem large enough that no block's heads are cut into slices, and one that is not.
TEST(SsdCuda, GradientsAreSetWhereAsked) {
    for (const int64_t chunk : {1, 64}) {
        for (int which = 0; which < 4; ++which) {
            const SsdCase c{.h = 4, .p = 8, .g = 2, .n = 16, .cu_seqlens = {0, 300}, .padding = 7};
            const SsdSet set{which == 0, which == 1, which == 2, which == 3};
            expect_gradients<float>(c, chunk, 24, true, set);
            expect_gradients<bf16>(c, chunk, 25, true, set);
        }
    }
}

// Absent gradients are not computed; of no tokens only the states' gradients pass through.
TEST(SsdCuda, AbsentGradientsAndNoTokens) {
    SsdCase c{.h = 4, .p = 8, .g = 2, .n = 16, .cu_seqlens = {0, 0}};
    expect_gradients<float>(c, 64, 30, true);
    c.cu_seqlens = {0, 80};
    SsdArguments<float> arguments(c, random_ssd(c, 31));
    const SsdInputs<float> host = arguments.inputs();
    const Outputs<float> o = run<float>(c, host, 64);
    const std::vector<float> grad_y = Random(32).vector(c.t() * c.h * c.p);
    const Gradients all = run_backward(c, host, o.chunk_states, grad_y, {}, 64);
    Mover move(c);
    std::vector<float> grad_A(static_cast<size_t>(c.h), kGradientStart);
    SsdGradients<float> only;
    const View<float, 1> here(grad_A.data(), {c.h});
    only.A = move(here);
    ssd_backward<float>(cuda_exec(), moved(move, host),
                        move(View<const float, 4>(o.chunk_states.data(), {2, c.h, c.p, c.n})),
                        move(View<const float, 3>(grad_y.data(), {c.t(), c.h, c.p})), {}, only);
    move.back(only.A, here);
    expect_close(added(grad_A), to_double(all.A), 2e-5, "A");
}

// States of more columns than a block has.
std::vector<SsdCase> wide_shapes() {
    return {
        {.h = 2, .p = 5, .g = 1, .n = 129, .padding = 1},
        {.h = 6, .p = 64, .g = 2, .n = 160, .D_width = 64},
        {.h = 2, .p = 65, .g = 2, .n = 192, .initial_state = false, .D_width = 0, .padding = 5},
        {.h = 4, .p = 64, .g = 1, .n = 256, .padding = 16},
        {.h = 1, .p = 17, .g = 1, .n = 300, .dt_bias = false, .padding = 8},
    };
}

TEST(SsdCuda, WideStates) {
    for (SsdCase c : wide_shapes()) {
        for (const std::vector<int64_t>& ends :
             {std::vector<int64_t>{0, 0}, {0, 1}, {0, 200}, {0, 0, 5, 41, 42, 198}}) {
            c.cu_seqlens = ends;
            for (const int64_t chunk : {37, 64, 1000}) {
                SCOPED_TRACE(name_of(c) + fmt::format(" t {} chunk {}", ends.back(), chunk));
                expect_reference<float>(c, chunk, 33);
                expect_reference<bf16>(c, chunk, 34);
            }
        }
        expect_step<float>(c);
        expect_step<bf16>(c);
        expect_step<float, bf16>(c);
        expect_step<bf16, bf16>(c);
    }
}

TEST(SsdCuda, GradientsOfWideStates) {
    for (SsdCase c : wide_shapes()) {
        for (const std::vector<int64_t>& ends :
             {std::vector<int64_t>{0, 2}, {0, 300}, {0, 9, 9, 10, 180, 180}}) {
            c.cu_seqlens = ends;
            for (const int64_t chunk : {37, 64, 1000}) {
                expect_gradients<float>(c, chunk, 35, chunk != 64);
                expect_gradients<bf16>(c, chunk, 36, true, {true, true, true, true});
            }
        }
        expect_gradients<bf16>(c, 64, 37, false);
    }
}

}  // namespace
}  // namespace ssm
