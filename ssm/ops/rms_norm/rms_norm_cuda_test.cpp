// The CUDA kernels against the CPU's (which rms_norm_test.cpp holds against f64): every variant and path
// (warp or block per row, plain loop), strided and misaligned rows; gradients add, the same bytes from run to
// run.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/rms_norm/rms_norm.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"
#include "tests/support/gradcheck.h"

namespace ssm {
namespace {

using Gate = RmsNormOptions::Gate;

struct Case {
    int64_t t, d;
    RmsNormOptions options;
    bool weighted;
    int64_t offset, apart;  // columns before a row and after it, in a wider tensor
};

// [t d] inside a wider tensor on the host, with its copy on the device. Gaps are NaN and must stay so.
template <class T>
struct Both {
    int64_t t, width, offset, d;
    std::vector<T> host;
    Tensor there;

    Both() = default;
    Both(const Case& c, std::vector<T> values)
        : t(c.t), width(c.d + c.offset + c.apart), offset(c.offset), d(c.d), host(std::move(values)) {
        host.reserve(1);  // of no rows there is a view, too
        for (int64_t i = 0; i < t * width; ++i) {
            if (i % width < offset || i % width >= offset + d)
                host[static_cast<size_t>(i)] = static_cast<T>(NAN);
        }
        there = test::on_device(host, {t, width});
    }
    static Both random(const Case& c, uint64_t seed) {
        return {c, test::Random(seed).vector<T>(c.t * (c.d + c.offset + c.apart), -2.0f, 2.0f)};
    }
    static Both filled(const Case& c, float value) {
        return {c,
                std::vector<T>(static_cast<size_t>(c.t * (c.d + c.offset + c.apart)), static_cast<T>(value))};
    }
    template <class U = const T>
    View<U, 2> cpu() {
        return {host.data() + offset, {t, d}, width};
    }
    template <class U = const T>
    View<U, 2> gpu() const {
        return there.columns(offset, offset + d).view<U, 2>();
    }
    void compare(double tolerance, const char* what) const {
        test::expect_close(test::from_device<T>(there), test::to_double(host), tolerance, what);
    }
};

template <class T>
constexpr double kTolerance = sizeof(T) == 2 ? 4e-3 : 2e-6;

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const auto gate : {Gate::none, Gate::before, Gate::after}) {
        for (const auto& [t, d, groups] : std::vector<std::array<int64_t, 3>>{{0, 8, 1},
                                                                              {1, 1, 1},
                                                                              {3, 53, 1},
                                                                              {7, 8, 2},
                                                                              {33, 192, 3},
                                                                              {5, 256, 1},
                                                                              {9, 264, 1},
                                                                              {2200, 768, 1},
                                                                              {2, 768, 1},
                                                                              {1, 1536, 1},
                                                                              {2113, 1536, 1},
                                                                              {550, 1536, 8},
                                                                              {40, 1540, 1},
                                                                              {17, 4096, 1},
                                                                              {3, 12288, 1},
                                                                              {2, 12296, 1}}) {
            for (const auto& [offset, apart] : std::vector<std::array<int64_t, 2>>{{0, 0}, {1, 2}, {8, 16}}) {
                if (offset == 1 && t > 1000) continue;
                all.push_back({t, d, {1e-5f, groups, d % 3 == 0, gate}, d != 256, offset, apart});
            }
        }
    }
    return all;
}

template <class X, class Y>
void check_forward(const Case& c) {
    auto x = Both<X>::random(c, 1);
    Both<Y> z = Both<Y>::random(c, 2), y = Both<Y>::filled(c, NAN);
    std::vector<float> weight = test::Random(3).vector(c.d), rstd = test::nan_vector(c.t * c.options.groups);
    rstd.reserve(1);
    const Tensor weight_there = test::on_device(weight, {c.d}),
                 rstd_there = test::on_device(rstd, {c.t, c.options.groups});
    RmsNormInputs<X, Y> here{x.cpu(), {}, {}}, there{x.gpu(), {}, {}};
    if (c.weighted) here.weight = {weight.data(), {c.d}}, there.weight = weight_there.view<const float, 1>();
    if (c.options.gate != Gate::none) here.z = z.cpu(), there.z = z.gpu();
    rms_norm<X, Y>(make_cpu_exec(2), here, y.template cpu<Y>(), {rstd.data(), {c.t, c.options.groups}},
                   c.options);
    rms_norm<X, Y>(test::cuda_exec(), there, y.template gpu<Y>(), rstd_there.view<float, 2>(), c.options);
    y.compare(kTolerance<Y>, "y");
    test::expect_close(test::from_device<float>(rstd_there), rstd, 1e-6, "rstd");
}

template <class X, class Y>
void check_add(const Case& c) {
    auto x = Both<X>::random(c, 1);
    auto residual = Both<float>::random(c, 4);
    auto y = Both<Y>::filled(c, NAN);
    std::vector<float> weight = test::Random(3).vector(c.d);
    const Tensor weight_there = test::on_device(weight, {c.d});
    // In place, without rstd.
    add_rms_norm<X, Y>(make_cpu_exec(2), residual.cpu(), x.cpu(), {weight.data(), {c.d}},
                       residual.template cpu<float>(), y.template cpu<Y>(), {}, c.options);
    add_rms_norm<X, Y>(test::cuda_exec(), residual.gpu(), x.gpu(), weight_there.view<const float, 1>(),
                       residual.template gpu<float>(), y.template gpu<Y>(), {}, c.options);
    residual.compare(0, "residual_out");
    y.compare(kTolerance<Y>, "y");
}

// The same numbers in f32, for the CPU.
template <class T>
Both<float> widened(const Both<T>& b, const Case& c) {
    std::vector<float> values;
    for (const T x : b.host) values.push_back(static_cast<float>(x));
    return {c, values};
}
// What is on the device against f32 on the host. `terms`: the L2 norm of what the results are differences of
// (0: they are no differences), to which f32's own errors are relative; rounding to bf16 is to the results.
template <class T>
void compare_with(const Both<T>& there, const Both<float>& host, const char* what, double terms = 0) {
    const std::vector<T> got = test::from_device<T>(there.there);
    const std::vector<double> want = test::to_double(host.host);
    double norm = 0;
    for (const double x : want) norm += std::isnan(x) ? 0.0 : x * x;
    norm = std::sqrt(norm);
    const double relative = test::relative_l2(got, want), scale = norm > 0 ? norm : 1.0;
    EXPECT_LE(relative * scale, (sizeof(T) == 2 ? 5e-3 : 3e-6) * norm + 1e-6 * terms)
        << what << ": relative " << relative << " of " << norm << ", terms " << terms;
}
// The gradient of x is rstd (g - y mean(g y)), with g = grad_y weight: of a group of one column nothing but
// eps / v^2 of g is left. The norm of rstd g; a gate's factors (silu(z), its slope by x) are below 2.2 here,
// and the errors of sigmoid count twice in y^2 when it comes before.
double terms_of(const Case& c, const Both<float>& grad_y, const std::vector<float>& weight,
                const std::vector<float>& rstd) {
    const int64_t groups = c.options.groups, columns = c.d / groups;
    double sum = 0;
    for (int64_t i = 0; i < c.t * c.d; ++i) {
        const int64_t r = i / c.d, j = i % c.d;
        double g = static_cast<double>(grad_y.host[static_cast<size_t>(r * grad_y.width + c.offset + j)]) *
                   static_cast<double>(rstd[static_cast<size_t>(r * groups + j / columns)]);
        if (c.weighted)
            g *= static_cast<double>(weight[static_cast<size_t>(j)]) + (c.options.unit_offset ? 1.0 : 0.0);
        sum += g * g;
    }
    return std::sqrt(sum) * (c.options.gate == Gate::none ? 1.0 : c.options.gate == Gate::before ? 4.4 : 2.2);
}

// `set`: gradients are written over NaN.
template <class X, class Y>
void check_backward(const Case& c, bool set) {
    SCOPED_TRACE(testing::Message() << (set ? "set " : "add ") << sizeof(X) << " " << sizeof(Y));
    const bool gated = c.options.gate != Gate::none;
    const float start = set ? NAN : test::kGradientStart;
    auto x = Both<X>::random(c, 1);
    auto z = Both<Y>::random(c, 2), grad_y = Both<Y>::random(c, 5);
    auto x_here = widened(x, c), z_here = widened(z, c), grad_y_here = widened(grad_y, c);
    auto grad_x = Both<X>::filled(c, start);
    auto grad_z = Both<Y>::filled(c, start), branch = Both<Y>::filled(c, NAN);
    auto grad_x_here = Both<float>::filled(c, start), grad_z_here = grad_x_here,
         branch_here = Both<float>::filled(c, NAN), y = Both<float>::filled(c, NAN);
    std::vector<float> weight = test::Random(3).vector(c.d), rstd = test::nan_vector(c.t * c.options.groups),
                       grad_weight(static_cast<size_t>(c.d), test::kGradientStart);
    rstd.reserve(1), grad_z_here.host.reserve(1);
    const Tensor weight_there = test::on_device(weight, {c.d}),
                 grad_weight_there = test::on_device(grad_weight, {c.d});
    RmsNormInputs<float, float> here{x_here.cpu(), {}, {}};
    RmsNormInputs<X, Y> there{x.gpu(), {}, {}};
    RmsNormGradients<float, float> grad{grad_x_here.cpu<float>(), {}, {}, branch_here.cpu<float>(), set, set};
    RmsNormGradients<X, Y> grad_there{grad_x.template gpu<X>(), {}, {}, branch.template gpu<Y>(), set, set};
    if (c.weighted) {
        here.weight = {weight.data(), {c.d}}, there.weight = weight_there.view<const float, 1>();
        grad.weight = {grad_weight.data(), {c.d}}, grad_there.weight = grad_weight_there.view<float, 1>();
    }
    if (gated) {
        here.z = z_here.cpu(), there.z = z.gpu();
        grad.z = grad_z_here.cpu<float>(), grad_there.z = grad_z.template gpu<Y>();
    }
    const View<float, 2> rstd_here(rstd.data(), {c.t, c.options.groups});
    rms_norm<float, float>(make_cpu_exec(2), here, y.cpu<float>(), rstd_here, c.options);
    const Tensor rstd_there = test::on_device(rstd, {c.t, c.options.groups});
    rms_norm_backward<float, float>(make_cpu_exec(2), here, rstd_here, grad_y_here.cpu(), grad, c.options);
    rms_norm_backward<X, Y>(test::cuda_exec(), there, rstd_there.view<const float, 2>(), grad_y.gpu(),
                            grad_there, c.options);
    const double terms = c.d == c.options.groups ? terms_of(c, grad_y_here, weight, rstd) : 0.0;
    compare_with(grad_x, grad_x_here, "grad x", terms);
    compare_with(branch, branch_here, "branch", terms);
    if (gated) compare_with(grad_z, grad_z_here, "grad z", terms);
    test::expect_close(test::from_device<float>(grad_weight_there), grad_weight, 1e-5, "grad weight");
}

template <template <class, class> class Check>
void for_all_types(const Case& c) {
    SCOPED_TRACE(testing::Message() << "t " << c.t << " d " << c.d << " groups " << c.options.groups
                                    << " gate " << static_cast<int>(c.options.gate) << " offset "
                                    << c.offset);
    Check<float, float>::run(c);
    Check<float, bf16>::run(c);
    Check<bf16, bf16>::run(c);
}
template <class X, class Y>
struct CheckForward {
    static void run(const Case& c) { check_forward<X, Y>(c); }
};
template <class X, class Y>
struct CheckAdd {
    static void run(const Case& c) { check_add<X, Y>(c); }
};
template <class X, class Y>
struct CheckBackward {
    static void run(const Case& c) {
        const bool large = c.t > 1000;  // one of the two
        if (!large || c.offset == 0) check_backward<X, Y>(c, false);
        if (!large || c.offset > 0) check_backward<X, Y>(c, true);
    }
};

TEST(RmsNormCuda, MatchesCpu) {
    for (const Case& c : cases()) for_all_types<CheckForward>(c);
}

TEST(RmsNormCuda, AddMatchesCpu) {
    for (const Case& c : cases()) {
        if (c.options.gate == Gate::none) for_all_types<CheckAdd>(c);
    }
}

TEST(RmsNormCuda, GradientsMatchCpu) {
    for (const Case& c : cases()) for_all_types<CheckBackward>(c);
}

TEST(RmsNormCuda, GradientOfWeightIsReproducible) {
    const Exec& ex = test::cuda_exec();
    const int64_t t = 3001, d = 768;
    const Tensor x = test::on_device(test::Random(1).vector(t * d), {t, d}),
                 weight = test::on_device(test::Random(2).vector(d), {d}),
                 grad_y = test::on_device(test::Random(3).vector(t * d), {t, d}),
                 rstd = Tensor::empty(ex, {t, 1}), y = Tensor::empty(ex, {t, d});
    const RmsNormInputs<float, float> in{x.view<const float, 2>(), weight.view<const float, 1>(), {}};
    rms_norm<float, float>(ex, in, y.view<float, 2>(), rstd.view<float, 2>());
    std::vector<float> first;
    for (int i = 0; i < 4; ++i) {
        const Tensor grad = Tensor::zeros(ex, {d});
        rms_norm_backward<float, float>(ex, in, rstd.view<const float, 2>(), grad_y.view<const float, 2>(),
                                        {{}, grad.view<float, 1>(), {}});
        const auto now = test::from_device<float>(grad);
        if (i == 0) first = now;
        EXPECT_EQ(now, first);
    }
}

}  // namespace
}  // namespace ssm
