#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "ssm/core/parallel.h"
#include "ssm/core/tensor.h"

namespace ssm {
namespace {

TEST(Bf16, RoundsToNearestEvenAndKeepsNan) {
    EXPECT_EQ(bf16(1.0f).bits, 0x3f80);
    EXPECT_EQ(bf16(1.00390625f).bits, 0x3f80);  // half way: to even
    EXPECT_EQ(bf16(1.01171875f).bits, 0x3f82);  // half way: to even, upwards
    EXPECT_EQ(bf16(1.005f).bits, 0x3f81);
    EXPECT_TRUE(std::isnan(static_cast<float>(bf16(NAN))));
    EXPECT_TRUE(std::isinf(static_cast<float>(bf16(INFINITY))));
    EXPECT_EQ(static_cast<float>(bf16(-2.5f)), -2.5f);
}

TEST(F16, ConvertsEveryClassOfNumber) {
    EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
    EXPECT_EQ(f16_to_float(0xc000), -2.0f);
    EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f);
    EXPECT_EQ(f16_to_float(0x7bff), 65504.0f);
    EXPECT_TRUE(std::isinf(f16_to_float(0x7c00)));
    EXPECT_TRUE(std::isnan(f16_to_float(0x7e00)));
}

TEST(Tensor, ColumnsShareStorageAndKeepTheRowStride) {
    Tensor t = Tensor::from_floats({2, 4}, {0, 1, 2, 3, 4, 5, 6, 7});
    Tensor c = t.columns(1, 3);
    EXPECT_FALSE(c.dense());
    EXPECT_EQ((c.view<float, 2>()(1, 0)), 5.0f);
    EXPECT_EQ((c.reshape({2, 2, 1}).view<float, 3>()(1, 1, 0)), 6.0f);
    EXPECT_EQ(c.clone().data<float>()[2], 5.0f);
    c.fill_zero();
    EXPECT_EQ(t.data<float>()[0], 0.0f);
    EXPECT_EQ(t.data<float>()[3], 3.0f);
    EXPECT_EQ(t.data<float>()[6], 0.0f);
}

TEST(Tensor, ViewErrorsNameShapeAndType) {
    Tensor t = Tensor::zeros({2, 3});
    try {
        t.view<bf16, 2>();
        FAIL();
    } catch (const Error& e) {
        EXPECT_STREQ(e.what(), "[tensor] dtype is f32 where bf16 was expected");
    }
    EXPECT_THROW((t.view<float, 3>()), Error);
    EXPECT_THROW(t.reshape({7}), Error);
    EXPECT_THROW(element_count({int64_t{1} << 40, int64_t{1} << 40}), Error);
}

TEST(Allocator, ReusesReleasedBlocks) {
    const Exec ex = make_cpu_exec(1);
    std::byte* first = Tensor::empty(ex, {1000}).raw();
    Tensor again = Tensor::empty(ex, {1000});
    EXPECT_EQ(again.raw(), first);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(again.raw()) % 64, 0u);
    EXPECT_GE(ex.allocator->bytes_in_use(), 4000u);
}

TEST(ParallelFor, CoversEveryIndexOnceOnAnyThreadCount) {
    for (int threads : {1, 2, 3, 7}) {
        Exec ex = make_cpu_exec(threads);
        for (int64_t n : {0, 1, 15, 16, 17, 1000}) {
            std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
            parallel_for(ex, n, 16, [&](int64_t b, int64_t e) {
                for (int64_t i = b; i < e; ++i) ++seen[static_cast<size_t>(i)];
            });
            for (auto& s : seen) EXPECT_EQ(s, 1);
        }
    }
}

}  // namespace
}  // namespace ssm
