// Copies of 16 bytes from global to shared memory that a thread asks for and does not wait for. Included by
// .cu files only.
#pragma once

#include <cstdint>

namespace ssm::cuda {

// Both addresses are multiples of 16. Zeros where not `inside`.
__device__ inline void copy16(void* to, const void* from, bool inside = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}

// The thread's own, all of them: others' need a barrier as well.
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The thread's copies since the last call are a group; waits until at most kLeft groups are under way.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void wait_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace ssm::cuda
