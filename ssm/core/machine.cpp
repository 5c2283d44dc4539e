#include "ssm/core/machine.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "ssm/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/core/machine.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ssm::machine_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A sum that depends on every element, so that no load can be left out. The memory is read as `Streams` runs
// side by side. `count` must be a multiple of Streams vectors.
template <int Streams>
float ReadStreams(const float* p, int64_t count) {
    const hn::ScalableTag<float> d;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    const int64_t length = count / Streams;
    hn::Vec<decltype(d)> sums[Streams];
    for (auto& s : sums) s = hn::Zero(d);
    for (int64_t i = 0; i < length; i += n) {
        for (int s = 0; s < Streams; ++s) sums[s] = hn::Add(sums[s], hn::Load(d, p + s * length + i));
    }
    for (int s = 1; s < Streams; ++s) sums[0] = hn::Add(sums[0], sums[s]);
    return hn::GetLane(hn::SumOfLanes(d, sums[0]));
}

float ReadAll(const float* p, int64_t count, int pattern) {
    if (pattern == 0) return ReadStreams<1>(p, count);
    if (pattern == 1) return ReadStreams<4>(p, count);
    return ReadStreams<8>(p, count);
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace ssm::machine_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
namespace machine_detail {
HWY_EXPORT(ReadAll);
HWY_EXPORT(TargetName);
float read_all(const float* p, int64_t count, int pattern) {
    return HWY_DYNAMIC_DISPATCH(ReadAll)(p, count, pattern);
}
}  // namespace machine_detail

std::string instruction_set() { return HWY_DYNAMIC_DISPATCH(machine_detail::TargetName)(); }

double measure_read_bandwidth(const Exec& ex) {
    using Clock = std::chrono::steady_clock;
    constexpr int64_t kCount = int64_t{64} << 20, kPiece = int64_t{1} << 20;  // floats: 256 MiB, 4 MiB
    constexpr int kPasses = 15;
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
            sink = machine_detail::read_all(p + begin, end - begin, pass % 3);
        });
        const std::chrono::duration<double> seconds = Clock::now() - start;
        best = std::max(best, static_cast<double>(kCount) * sizeof(float) / seconds.count());
    }
    static_cast<void>(sink);
    return best;
}

}  // namespace ssm
#endif
