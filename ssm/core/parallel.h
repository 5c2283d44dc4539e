// parallel_for over OpenMP, the runtime that oneDNN uses too: one pool, no oversubscription.
#pragma once

#include <algorithm>
#include <cstdint>

#include <omp.h>

#include "ssm/core/exec.h"

namespace ssm {

// Calls f(begin, end) on up to ex.threads threads; the ranges are contiguous, cover [0, n) and hold a
// multiple of `grain` indices except the last. Which thread gets which range does not depend on timing.
// `f` must not throw. Nested calls run serially.
template <class F>
void parallel_for(const Exec& ex, int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t pieces = (n + grain - 1) / grain;
    const int threads = static_cast<int>(std::min<int64_t>(pieces, omp_in_parallel() ? 1 : ex.threads));
    if (threads <= 1) {
        f(int64_t{0}, n);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = pieces * me / count * grain;
        const int64_t end = std::min(n, pieces * (me + 1) / count * grain);
        if (begin < end) f(begin, end);
    }
}

}  // namespace ssm
