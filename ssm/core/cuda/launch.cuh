// Launches that begin before the kernel before them has ended (programmatic dependent launch), in a stream or
// a captured graph. Included by .cu files only.
//
// A kernel launched by launch_overlapped may, before wait_for_inputs(), only read what no kernel that could
// still run writes: weights. After it everything asked of the stream before is complete and visible, because
// each of these kernels waits. allow_next() lets the next one begin as soon as every block of this one has
// called it or ended; called first, it lets the next kernels fetch their weights while this one works; called
// after this kernel has asked for what it needs, it keeps the next one's requests from coming before. Which
// is better has to be measured (norm_linear's README.md).
#pragma once

#include <string_view>
#include <utility>

#include "ssm/core/cuda/context.h"

namespace ssm::cuda {

__device__ inline void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void allow_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Asks for the cache line of p to be brought to L2: a hint, of memory that may still be written.
__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// The same of `bytes` in one request; both multiples of 16.
__device__ inline void prefetch_l2(const void* p, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

struct LaunchShape {
    dim3 blocks, threads;
    size_t shared_bytes = 0;
    unsigned cluster = 1;  // blocks that reach each other's shared memory: at most 8
};

template <class... Wanted, class... Given>
void launch_overlapped(const Exec& ex, std::string_view op, void (*kernel)(Wanted...),
                       const LaunchShape& shape, Given&&... args) {
    cudaLaunchAttribute attributes[3] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    // The same split for all of them: a multiprocessor changes it only when it is idle.
    attributes[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[1].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
    attributes[2].id = cudaLaunchAttributeClusterDimension;
    attributes[2].val.clusterDim = {shape.cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = shape.blocks;
    config.blockDim = shape.threads;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream_of(ex);
    config.attrs = attributes;
    config.numAttrs = shape.cluster > 1 ? 3 : 2;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(args)...), op);
}

}  // namespace ssm::cuda
