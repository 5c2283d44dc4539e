// The CUDA kernels against the CPU's in f32, which their own test holds to an f64 loop and finite
// differences: the same problem is put on both devices and every result compared.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <type_traits>

#include "ssm/ops/selective_scan/selective_scan.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using TimeParallel = SelectiveScanOptions::TimeParallel;
using test::expect_close;
using Results = std::map<std::string, std::vector<float>>;

struct Flags {
    bool D = true, z = true, bias = true, initial = true, softplus = true, final_gradient = true;
};

struct Case {
    int64_t d = 40, n = 16;
    std::vector<int64_t> lengths{70};
    int64_t pad = 0;  // > 0: rows lie apart, and begin one element after an aligned address
    Flags flags = {};
    SelectiveScanOptions options = {};
    SelectiveScanSet set = {};
    float slowest = -0.01f, fastest = -4.0f;  // A lies between
};

// The case's arguments on one device; the numbers depend on the case alone. Activations are rounded to
// Rounded, then of T.
template <class T, class Rounded = T>
class Problem {
public:
    Problem(const Exec& ex, const Case& c) : ex_(ex), c_(c), s_(static_cast<int64_t>(c.lengths.size())) {
        cu_.push_back(0);
        for (const int64_t length : c.lengths) cu_.push_back(cu_.back() + length);
        t_ = cu_.back();
        const bool softplus = c.flags.softplus;
        u_ = activations(c.d, -1, 1), z_ = activations(c.d, -3, 3);
        delta_ = softplus ? activations(c.d, -4, 1) : activations(c.d, 0.01f, 0.1f);
        B_ = rows(c.n, -1, 1), C_ = rows(c.n, -1, 1), grad_y_ = activations(c.d, -1, 1);
        A_ = dense({c.d, c.n}, c.fastest, c.slowest), D_ = dense({c.d}, -1, 1);
        bias_ = softplus ? dense({c.d}, -1, 1) : dense({c.d}, 0, 0.02f);
        initial_ = dense({s_, c.d, c.n}, -1, 1), grad_final_ = dense({s_, c.d, c.n}, -1, 1);
    }

    Results forward() {
        const Tensor y = filled<T>({t_, c_.d + c_.pad}, NAN), y_view = window(y, c_.d),
                     final_state = filled<float>({s_, c_.d, c_.n}, NAN);
        states_ = filled<float>({selective_scan_chunks(cu_, c_.options.chunk), c_.d, c_.n}, NAN);
        selective_scan<T>(ex_, inputs(), y_view.view<T, 2>(), final_state.view<float, 3>(),
                          states_.view<float, 3>(), c_.options);
        return {{"y", floats<T>(y)},
                {"final_state", floats<float>(final_state)},
                {"chunk_states", floats<float>(states_)}};
    }
    // After forward().
    Results backward() {
        const int64_t wide = c_.d + c_.pad, narrow = c_.n + c_.pad;
        const auto start = [&](const Shape& shape) { return filled<float>(shape, test::kGradientStart); };
        const auto typed = [&](const Shape& shape) { return filled<T>(shape, test::kGradientStart); };
        const Tensor u = typed({t_, wide}), delta = typed({t_, wide}), z = typed({t_, wide}),
                     A = start({c_.d, c_.n}), B = start({t_, narrow}), C = start({t_, narrow}),
                     D = start({c_.d}), bias = start({c_.d}), initial = start({s_, c_.d, c_.n});
        SelectiveScanGradients<T> grad{.set = c_.set};
        const Tensor wu = window(u, c_.d), wd = window(delta, c_.d), wz = window(z, c_.d),
                     wB = window(B, c_.n), wC = window(C, c_.n);
        grad.u = wu.view<T, 2>(), grad.delta = wd.view<T, 2>(), grad.A = A.view<float, 2>();
        grad.B = wB.view<float, 2>(), grad.C = wC.view<float, 2>(), grad.delta_bias = bias.view<float, 1>();
        if (c_.flags.D) grad.D = D.view<float, 1>();
        if (c_.flags.z) grad.z = wz.view<T, 2>();
        grad.initial_state = initial.view<float, 3>();
        View<const float, 3> grad_final;
        if (c_.flags.final_gradient) grad_final = grad_final_.view<const float, 3>();
        const Tensor y = grad_y_.clone(), wy = window(y, c_.d);
        if (ex_.device != Device::cpu) grad.y = wy.view<T, 2>();  // over grad_y
        selective_scan_backward<T>(ex_, inputs(), states_.view<const float, 3>(), wy.view<const T, 2>(),
                                   grad_final, grad, c_.options);
        Results all{{"u", floats<T>(u)},
                    {"delta", floats<T>(delta)},
                    {"z", floats<T>(z)},
                    {"A", floats<float>(A)},
                    {"B", floats<float>(B)},
                    {"C", floats<float>(C)},
                    {"D", floats<float>(D)},
                    {"delta_bias", floats<float>(bias)},
                    {"initial_state", floats<float>(initial)}};
        for (auto& [name, values] : all) values = test::added(values);
        all["y"] = floats<T>(y);
        const std::vector<float> around = floats<T>(grad_y_);
        const int64_t lead = c_.pad > 0 ? 1 : 0;
        for (int64_t i = 0; i < t_ * wide; ++i) {  // between its rows nothing has changed
            if (i % wide >= lead && i % wide < lead + c_.d) continue;
            float& x = all["y"][static_cast<size_t>(i)];
            EXPECT_EQ(x, around[static_cast<size_t>(i)]);
            x = NAN;
        }
        return all;
    }
    // Every token by a step; the rows of `inputs` are sequences, so all lengths must be equal.
    Results steps() {
        const Tensor state = initial_.clone(), y = filled<T>({t_, c_.d + c_.pad}, NAN);
        const int64_t l = t_ / s_;
        for (int64_t i = 0; i < l; ++i) {
            SelectiveScanInputs<T> in = inputs();
            const auto every = [&](auto& view, int64_t width) {
                if (view) view = {view.data + i * view.stride, {s_, width}, l * view.stride};
            };
            every(in.u, c_.d), every(in.z, c_.d), every(in.delta, c_.d), every(in.B, c_.n), every(in.C, c_.n);
            const View<T, 2> out = window(y, c_.d).template view<T, 2>();
            selective_scan_step<T>(ex_, in, state.view<float, 3>(),
                                   {out.data + i * out.stride, {s_, c_.d}, l * out.stride});
        }
        return {{"y", floats<T>(y)}, {"final_state", floats<float>(state)}};
    }
    SelectiveScanInputs<T> inputs() const {
        SelectiveScanInputs<T> in;
        in.u = window(u_, c_.d).template view<const T, 2>();
        in.delta = window(delta_, c_.d).template view<const T, 2>();
        in.A = A_.view<const float, 2>();
        in.B = window(B_, c_.n).template view<const float, 2>(),
        in.C = window(C_, c_.n).template view<const float, 2>();
        if (c_.flags.D) in.D = D_.view<const float, 1>();
        if (c_.flags.z) in.z = window(z_, c_.d).template view<const T, 2>();
        if (c_.flags.bias) in.delta_bias = bias_.view<const float, 1>();
        if (c_.flags.initial) in.initial_state = initial_.view<const float, 3>();
        in.cu_seqlens = cu_;
        in.delta_softplus = c_.flags.softplus;
        return in;
    }
    const Tensor& u() const { return u_; }
    const Tensor& z() const { return z_; }

private:
    Tensor window(const Tensor& wide, int64_t width) const {
        const int64_t lead = c_.pad > 0 ? 1 : 0;
        return c_.pad > 0 ? wide.columns(lead, lead + width) : wide;
    }
    Tensor rows(int64_t width, float low, float high) {
        const Shape shape{t_, width + c_.pad};
        return test::on_device(random_.vector(element_count(shape), low, high), shape, ex_);
    }
    Tensor activations(int64_t width, float low, float high) {
        const Shape shape{t_, width + c_.pad};
        std::vector<T> values;
        for (const Rounded v : random_.vector<Rounded>(element_count(shape), low, high))
            values.push_back(static_cast<T>(v));
        return test::on_device(values, shape, ex_);
    }
    Tensor dense(const Shape& shape, float low, float high) {
        return test::on_device(random_.vector(element_count(shape), low, high), shape, ex_);
    }
    template <class U>
    Tensor filled(const Shape& shape, float value) const {
        return test::on_device(
            std::vector<U>(static_cast<size_t>(element_count(shape)), static_cast<U>(value)), shape, ex_);
    }
    template <class U>
    static std::vector<float> floats(const Tensor& t) {
        std::vector<float> v;
        for (const U x : test::from_device<U>(t)) v.push_back(static_cast<float>(x));
        return v;
    }

    const Exec& ex_;
    const Case& c_;
    int64_t s_, t_ = 0;
    std::vector<int64_t> cu_;
    test::Random random_{1};
    Tensor u_, z_, delta_, A_, B_, C_, D_, bias_, initial_, grad_y_, grad_final_, states_;
};

const Exec& cpu_exec() {
    static const Exec ex = make_cpu_exec();
    return ex;
}

template <class T>
constexpr bool kRounds = std::is_same_v<T, bf16>;

// NaN between the rows of y, and untouched gradients there, must agree as well.
template <class T>
void compare(const Results& there, const Results& here) {
    for (const auto& [name, values] : here) {
        // Gradients of u, delta and z are rounded where they lie, at kGradientStart and more; those of B and
        // C block by block, and their sums over channels, as those of y over states, have terms of ten bits.
        const bool activation = name == "u" || name == "delta" || name == "z";
        const bool sum = name == "B" || name == "C";
        const double tolerance = !kRounds<T>   ? 1e-5
                                 : activation  ? 2e-2
                                 : name == "y" ? 5e-3
                                 : sum         ? 4e-3
                                 : name == "D" ? 1e-5
                                               : 1e-4;
        expect_close(there.at(name), values, tolerance, name.c_str());
    }
}

template <class T>
void check(const Case& c) {
    SCOPED_TRACE(testing::Message() << "d " << c.d << " n " << c.n << " s " << c.lengths.size()
                                    << " first length " << c.lengths.front() << " pad " << c.pad << " chunk "
                                    << c.options.chunk << " time parallel "
                                    << static_cast<int>(c.options.time_parallel));
    Problem<float, T> here(cpu_exec(), c);
    Problem<T> there(test::cuda_exec(), c);
    const Results y = here.forward();
    compare<T>(there.forward(), y);
    Results gradients = here.backward();
    gradients["y"] = y.at("y");
    compare<T>(there.backward(), gradients);
}

template <class T>
class SelectiveScanCuda : public testing::Test {};
using Activations = testing::Types<float, bf16>;
TYPED_TEST_SUITE(SelectiveScanCuda, Activations);

TYPED_TEST(SelectiveScanCuda, MatchesCpuAtEveryLengthAroundATile) {
    for (const auto mode : {TimeParallel::automatic, TimeParallel::never, TimeParallel::always}) {
        for (const int64_t l : {0, 1, 31, 32, 33, 63, 64, 65, 257, 1000})
            check<TypeParam>({.lengths = {l}, .options = {.time_parallel = mode}});
    }
}

TYPED_TEST(SelectiveScanCuda, MatchesCpuAtEveryWidth) {
    for (const int64_t d : {1, 7, 8, 9, 31, 32, 33, 100}) {
        for (const int64_t n : {1, 3, 4, 15, 16, 17, 33, 64})
            check<TypeParam>({.d = d, .n = n, .lengths = {37, 5}, .pad = 3});
    }
}

TYPED_TEST(SelectiveScanCuda, MatchesCpuWithEveryChunk) {
    for (const int64_t chunk : {1, 7, 16, 32, 33, 64, 1000}) {
        for (const auto mode : {TimeParallel::never, TimeParallel::always})
            check<TypeParam>(
                {.lengths = {130, 0, 64, 31}, .options = {.chunk = chunk, .time_parallel = mode}});
    }
}

TYPED_TEST(SelectiveScanCuda, MatchesCpuWithoutOptionalArguments) {
    for (int bits = 0; bits < 64; ++bits) {
        const Flags flags{(bits & 1) != 0, (bits & 2) != 0,  (bits & 4) != 0,
                          (bits & 8) != 0, (bits & 16) != 0, (bits & 32) != 0};
        check<TypeParam>({.d = 19, .lengths = {11, 90}, .flags = flags});
    }
}

TYPED_TEST(SelectiveScanCuda, PackedSequencesNeverSeeEachOther) {
    std::vector<int64_t> many{0, 5, 0, 0, 130, 1, 64, 0};
    for (const auto mode : {TimeParallel::never, TimeParallel::always})
        check<TypeParam>({.d = 33, .lengths = many, .pad = 1, .options = {.time_parallel = mode}});
    for (int64_t i = 0; i < 90; ++i) many.push_back(i % 41);  // more than a kernel's parameters hold
    for (const auto mode : {TimeParallel::never, TimeParallel::always})
        check<TypeParam>({.d = 33, .lengths = many, .pad = 1, .options = {.time_parallel = mode}});
}

TYPED_TEST(SelectiveScanCuda, GradientsAreSetWhereAsked) {
    for (int which = 0; which < 5; ++which)
        check<TypeParam>({.lengths = {40, 0, 5},
                          .pad = 2,
                          .set = {which == 0, which == 1, which == 2, which == 3, which == 4}});
}

TYPED_TEST(SelectiveScanCuda, StepsMatchTheScan) {
    for (const int64_t n : {1, 5, 16, 20, 64, 100}) {
        const Case c{.d = 70, .n = n, .lengths = {12, 12, 12}, .pad = 5};
        Problem<float, TypeParam> here(cpu_exec(), c);
        Problem<TypeParam> there(test::cuda_exec(), c);
        Results expected = here.forward();
        expected.erase("chunk_states");
        compare<TypeParam>(there.steps(), expected);
    }
}

TYPED_TEST(SelectiveScanCuda, OutputMayAliasUOrZ) {
    for (const auto mode : {TimeParallel::never, TimeParallel::always}) {
        const Case c{.lengths = {300}, .options = {.time_parallel = mode}};
        Problem<TypeParam> plain(test::cuda_exec(), c);
        const auto expected = plain.forward().at("y");
        for (const bool over_u : {true, false}) {
            Problem<TypeParam> p(test::cuda_exec(), c);
            const Tensor& y = over_u ? p.u() : p.z();
            selective_scan<TypeParam>(test::cuda_exec(), p.inputs(), y.view<TypeParam, 2>(), {}, {},
                                      c.options);
            const auto got = test::from_device<TypeParam>(y);
            for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(static_cast<float>(got[i]), expected[i]) << i;
        }
    }
}

TYPED_TEST(SelectiveScanCuda, SameBytesFromRunToRun) {
    const Case c{.d = 300, .lengths = {700, 3, 90}, .options = {.time_parallel = TimeParallel::always}};
    Problem<TypeParam> one(test::cuda_exec(), c), two(test::cuda_exec(), c);
    EXPECT_EQ(one.forward(), two.forward());
    const Results first = one.backward();
    for (int i = 0; i < 3; ++i) EXPECT_EQ(first, two.backward());
}

// What a training step does: the kernels in which every tile and block is whole.
TYPED_TEST(SelectiveScanCuda, WholeTilesOfWholeBlocks) {
    for (const auto mode : {TimeParallel::never, TimeParallel::always})
        for (const int64_t chunk : {32, 64})
            for (const int64_t pad : {0, 32})
                check<TypeParam>({.d = 64,
                                  .lengths = {96, 32, 0, 320},
                                  .pad = pad,
                                  .flags = {.initial = pad == 0},
                                  .options = {.chunk = chunk, .time_parallel = mode},
                                  .set = {true, true, pad == 0, true, pad == 0}});
}

// More blocks than multiprocessors (132 on an H100): a thread block has groups of them, the last not all.
TYPED_TEST(SelectiveScanCuda, SeveralBlocksForAMultiprocessor) {
    for (const auto mode : {TimeParallel::never, TimeParallel::always})
        for (const size_t sequences : {133, 265, 398})
            check<TypeParam>({.d = 32,
                              .lengths = std::vector<int64_t>(sequences, 64),
                              .options = {.time_parallel = mode}});
}

// Thousands of tokens, split over time and not.
TEST(SelectiveScanCudaNumerics, HoldsForLongSequences) {
    for (const auto mode : {TimeParallel::never, TimeParallel::always})
        check<float>({.d = 64, .lengths = {4096}, .options = {.time_parallel = mode}});
}

// States decay to nothing inside of a segment: the passes before a split stop there.
TYPED_TEST(SelectiveScanCuda, SegmentsLongerThanAStateReaches) {
    const SelectiveScanOptions split{.time_parallel = TimeParallel::always};
    check<TypeParam>({.d = 40, .lengths = {60000, 3000, 7}, .options = split, .slowest = -1.0f});
    // A few of them much later than the others: those passes go on with less and less.
    for (const int64_t n : {3, 16, 64})
        check<TypeParam>({.d = n > 16 ? 131 : 521,
                          .n = n,
                          .lengths = {9000, 500},
                          .options = split,
                          .slowest = -0.02f,
                          .fastest = -60.0f});
}

// They do not: those passes read all of a segment, of a tile or of more tiles than a block takes at a time.
TYPED_TEST(SelectiveScanCuda, SegmentsOfStatesThatHardlyDecay) {
    const SelectiveScanOptions split{.time_parallel = TimeParallel::always};
    for (const int64_t n : {5, 16, 64})
        check<TypeParam>({.d = 40,
                          .n = n,
                          .lengths = {700, 0, 1500, 64},
                          .pad = 1,
                          .options = split,
                          .slowest = -1e-5f,
                          .fastest = -1e-3f});
    for (const int64_t l : {2900, 4500, 6500})
        check<TypeParam>({.d = 520, .lengths = {l}, .options = split, .slowest = -1e-5f, .fastest = -1e-3f});
    check<TypeParam>({.d = 521, .lengths = {3000, 1400}, .options = split});
    check<TypeParam>({.d = 260, .n = 64, .lengths = {1500}, .options = split});
    check<TypeParam>(
        {.d = 260, .n = 33, .lengths = {1500, 40}, .flags = {.softplus = false}, .options = split});
}

TEST(SelectiveScanCudaErrors, TooManyStates) {
    const Case c{.n = 65, .lengths = {3}};
    Problem<float> p(test::cuda_exec(), c);
    try {
        p.forward();
        FAIL() << "nothing thrown";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(), "[selective_scan] `A` must be [d n] with n <= 64 on a GPU but n is 65");
    }
}

}  // namespace
}  // namespace ssm
