#include "ssm/core/machine.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/core/machine.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ssm::machine_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A sum that depends on every element, so that no load can be left out.
float ReadAll(const float* p, int64_t count) {
    const hn::ScalableTag<float> d;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i + 4 * n <= count; i += 4 * n) {
        hwy::Prefetch(p + i + 1024);
        s0 = hn::Add(s0, hn::Load(d, p + i));
        s1 = hn::Add(s1, hn::Load(d, p + i + n));
        s2 = hn::Add(s2, hn::Load(d, p + i + 2 * n));
        s3 = hn::Add(s3, hn::Load(d, p + i + 3 * n));
    }
    return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

}  // namespace ssm::machine_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
namespace machine_detail {
HWY_EXPORT(ReadAll);
float read_all(const float* p, int64_t count) { return HWY_DYNAMIC_DISPATCH(ReadAll)(p, count); }
}  // namespace machine_detail

double measure_read_bandwidth(const Exec& ex) {
    using Clock = std::chrono::steady_clock;
    constexpr int64_t kCount = int64_t{64} << 20, kPiece = int64_t{1} << 20;  // floats: 256 MiB, 4 MiB
    constexpr int kPasses = 12;
    struct Buffer {
        std::byte* data = allocate_aligned(kCount * sizeof(float));
        ~Buffer() { free_aligned(data, kCount * sizeof(float)); }
    } buffer;
    const float* p = reinterpret_cast<const float*>(buffer.data);
    parallel_for(ex, kCount, kPiece, [&](int64_t begin, int64_t end) {
        std::memset(buffer.data + begin * static_cast<int64_t>(sizeof(float)), 0,
                    static_cast<size_t>(end - begin) * sizeof(float));
    });
    double best = 0;
    volatile float sink = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
        const auto start = Clock::now();
        parallel_for(ex, kCount, kPiece, [&](int64_t begin, int64_t end) {
            sink = machine_detail::read_all(p + begin, end - begin);
        });
        const std::chrono::duration<double> seconds = Clock::now() - start;
        best = std::max(best, static_cast<double>(kCount) * sizeof(float) / seconds.count());
    }
    static_cast<void>(sink);
    return best;
}

}  // namespace ssm
#endif
