// parallel_for over OpenMP, the runtime that oneDNN uses too: one pool, no oversubscription.
#pragma once

#include <algorithm>
#include <cstdint>

#include <omp.h>

#include "ssm/core/exec.h"

#if defined(__SANITIZE_THREAD__)
// libgomp is not instrumented: ThreadSanitizer does not see that it starts and joins its threads.
// parallel_for says it.
extern "C" {
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#define SSM_TSAN_ACQUIRE(at) __tsan_acquire(at)
#define SSM_TSAN_RELEASE(at) __tsan_release(at)
#define SSM_NOT_INSTRUMENTED __attribute__((no_sanitize("thread")))
#else
#define SSM_TSAN_ACQUIRE(at)
#define SSM_TSAN_RELEASE(at)
#define SSM_NOT_INSTRUMENTED
#endif

namespace ssm {

// Calls f(begin, end) on up to ex.threads threads; the ranges are contiguous, cover [0, n) and hold a
// multiple of `grain` indices except the last. Which thread gets which range does not depend on timing.
// `f` must not throw. Nested calls run serially.
template <class F>
SSM_NOT_INSTRUMENTED void parallel_for(const Exec& ex, int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t pieces = (n + grain - 1) / grain;
    const int threads = static_cast<int>(std::min<int64_t>(pieces, omp_in_parallel() ? 1 : ex.threads));
    if (threads <= 1) {
        f(int64_t{0}, n);
        return;
    }
    [[maybe_unused]] char fork = 0, join = 0;
    SSM_TSAN_RELEASE(&fork);
#pragma omp parallel num_threads(threads)
    {
        SSM_TSAN_ACQUIRE(&fork);
        const int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = pieces * me / count * grain;
        const int64_t end = std::min(n, pieces * (me + 1) / count * grain);
        if (begin < end) f(begin, end);
        SSM_TSAN_RELEASE(&join);
    }
    SSM_TSAN_ACQUIRE(&join);
}

}  // namespace ssm
