// The CUDA kernels against the CPU's (which adamw_test.cpp holds against f64): several steps, any alignment;
// the norm to f64's precision and the same from run to run.
#include <gtest/gtest.h>

#include <cmath>

#include "ssm/ops/adamw/adamw.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

View<float, 1> from(const Tensor& t, int64_t offset, int64_t count) {
    return {t.view<float, 1>().data + offset, {count}};
}

void check_steps(int64_t count, int64_t offset) {
    SCOPED_TRACE(testing::Message() << "count " << count << " offset " << offset);
    const int64_t size = count + offset + 1;
    auto param = test::Random(1).vector(size), grad = test::Random(2).vector(size);
    std::vector<float> m(param.size(), 0.0f), v(param.size(), 0.0f);
    const Tensor param_there = test::on_device(param, {size}), grad_there = test::on_device(grad, {size}),
                 m_there = test::on_device(m, {size}), v_there = test::on_device(v, {size});
    AdamWOptions options;
    options.grad_scale = 0.7f;
    for (options.step = 1; options.step <= 3; ++options.step) {
        adamw_step(make_cpu_exec(1), {param.data() + offset, {count}}, {grad.data() + offset, {count}},
                   {m.data() + offset, {count}}, {v.data() + offset, {count}}, options);
        adamw_step(test::cuda_exec(), from(param_there, offset, count), from(grad_there, offset, count),
                   from(m_there, offset, count), from(v_there, offset, count), options);
    }
    test::expect_close(test::from_device<float>(param_there), param, 1e-6, "param");
    test::expect_close(test::from_device<float>(m_there), m, 1e-6, "m");
    test::expect_close(test::from_device<float>(v_there), v, 1e-6, "v");
}

TEST(AdamWCuda, StepsMatchCpu) {
    for (const int64_t count : {1, 3, 4, 5, 1023, 1024, 1025, 70000}) {
        for (const int64_t offset : {0, 1, 4}) check_steps(count, offset);
    }
}

TEST(AdamWCuda, SquaredNorm) {
    for (const int64_t count : {0, 1, 3, 5, 32768, 32769, 32771, 1000003}) {
        for (const int64_t offset : {0, 1}) {
            const auto x = test::Random(1).vector(count + offset);
            const Tensor there = test::on_device(x, {count + offset});
            double expected = 0;
            for (size_t i = static_cast<size_t>(offset); i < x.size(); ++i)
                expected += static_cast<double>(x[i]) * static_cast<double>(x[i]);
            const double norm = squared_norm(test::cuda_exec(), from(there, offset, count));
            EXPECT_NEAR(norm, expected, 1e-12 * expected) << count;
            for (int i = 0; i < 3; ++i)
                EXPECT_EQ(squared_norm(test::cuda_exec(), from(there, offset, count)), norm);
        }
    }
}

}  // namespace
}  // namespace ssm
