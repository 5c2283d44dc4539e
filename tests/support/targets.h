// Running a test on every instruction set that the kernels are compiled for and this processor has.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdint>
#include <functional>

namespace ssm::test {

// Calls f() with the kernels dispatched to each vector instruction set of this processor in turn, then to
// the fallback that every processor has.
inline void for_each_target(const std::function<void()>& f) {
    const int64_t supported = hwy::SupportedTargets();
    for (const int64_t target : {HWY_AVX3, HWY_AVX2, HWY_NEON, HWY_SCALAR}) {
        if (target != HWY_SCALAR && (supported & target) == 0) continue;
        SCOPED_TRACE(hwy::TargetName(target));
        hwy::GetChosenTarget().Update(target);
        f();
    }
    hwy::GetChosenTarget().Update(supported);
}

}  // namespace ssm::test
