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

// Host memory as a GPU's is kept: in segments.
class Pieced final : public Allocator {
public:
    ~Pieced() override { trim(); }

protected:
    size_t smallest_piece() const override { return size_t{1} << 20; }
};

TEST(Allocator, LargeBlocksAreCutFromSegmentsAndJoined) {
    constexpr size_t kMiB = size_t{1} << 20;
    Pieced a;
    size_t tile = 0, part = 0;
    std::byte* const whole = a.take(10 * kMiB - 5, tile);
    EXPECT_EQ(tile, 10 * kMiB);
    a.give(whole, tile);
    std::vector<std::byte*> parts;
    for (int i = 0; i < 4; ++i) {
        parts.push_back(a.take(5 * kMiB / 2, part));
        EXPECT_EQ(parts.back(), whole + static_cast<size_t>(i) * part);
    }
    EXPECT_EQ(a.reserved_bytes(), 10 * kMiB);
    EXPECT_EQ(a.peak_bytes(), 10 * kMiB);
    a.give(parts[1], part);
    size_t more = 0;
    std::byte* const other = a.take(3 * kMiB, more);  // what is free is too small
    EXPECT_EQ(a.reserved_bytes(), 13 * kMiB);
    for (const int i : {3, 0, 2}) a.give(parts[static_cast<size_t>(i)], part);
    EXPECT_EQ(a.take(10 * kMiB, tile), whole);
    a.give(whole, tile);
    EXPECT_EQ(a.take(2 * kMiB, part), whole);  // segments are not joined
    a.give(whole, part);
    a.give(other, more);
    EXPECT_EQ(a.take(2 * kMiB, part), other);  // the smallest that is large enough
    a.give(other, part);
    EXPECT_EQ(a.bytes_in_use(), 0u);
}

// What a graph took and gave back stays its own, whatever the pieces were at the time.
TEST(Allocator, WithholdsWhatWasTaken) {
    constexpr size_t kMiB = size_t{1} << 20;
    Pieced a;
    size_t c = 0, small = 0;
    std::byte* const before = a.take(2 * kMiB, c);
    a.give(before, c);
    a.start_withholding();  // lets that go
    EXPECT_EQ(a.reserved_bytes(), 0u);
    std::byte* const whole = a.take(10 * kMiB, c);
    a.give(whole, c);
    for (const size_t at : {size_t{4}, size_t{6}}) {  // the first 4 MiB, then the first 6
        std::byte* const p = a.take(at * kMiB, c);
        EXPECT_EQ(p, whole);
        a.give(p, c);
    }
    std::byte* const little = a.take(1000, small);
    std::byte* const kept = a.take(6 * kMiB, c);
    a.give(little, small);
    std::byte* const after = a.take(kMiB, c);
    a.give(after, c);
    std::vector<Allocator::Block> mine = a.stop_withholding();  // 10 MiB, of which 6 are in use
    EXPECT_EQ(after, whole + 6 * kMiB);
    EXPECT_EQ(a.bytes_in_use(), 10 * kMiB + small);
    std::byte* const other = a.take(3 * kMiB, c);
    EXPECT_EQ(a.reserved_bytes(), 13 * kMiB + small);
    a.give(other, c);
    a.give(kept, 6 * kMiB);
    EXPECT_EQ(a.take(6 * kMiB, c), whole);  // what it did not give back was not withheld
    a.give(whole, c);
    a.give_back(mine);
    EXPECT_EQ(a.bytes_in_use(), 0u);
    EXPECT_EQ(a.take(10 * kMiB, c), whole);
    a.give(whole, c);
    EXPECT_EQ(a.reserved_bytes(), 13 * kMiB + small);
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
