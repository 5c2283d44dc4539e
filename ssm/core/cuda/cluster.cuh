// Blocks of a cluster (launch_overlapped's `cluster`): who a block is, where another has its shared memory.
// Included by .cu files only.
#pragma once

#include <cstdint>

namespace ssm::cuda {

__device__ inline int cluster_size() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return static_cast<int>(n);
}
__device__ inline int cluster_rank() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
    return static_cast<int>(n);
}

// Where the block `rank` has what lies at p here, p in shared memory.
__device__ inline uint32_t address_in_rank(const void* p, int rank) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}

}  // namespace ssm::cuda
