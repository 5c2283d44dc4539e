// A weight brought to a GPU's L2 cache while a kernel runs that leaves the memory idle, for a later one to
// find.
//
//     const Prefetch prefetch(ex);   // from here on,
//     linear(ex, ...);               // beside what is asked for in between,
//     prefetch.bring(ex, weight);    // the beginning of `weight`
//
// In a captured graph (graph.h) it is a branch of its own, beside the first kernel after the mark. That one
// is asked for before the branch is, because CUDA runs a node's first successor where it ran the node and
// starts the others with a delay. Outside a capture, and on the CPU, nothing happens.
#pragma once

#include <memory>

#include "ssm/core/tensor.h"

namespace ssm {

class Prefetch {
public:
    explicit Prefetch(const Exec& ex);
    // At most a quarter of the cache: more would drive out what the kernels beside it read. `t` is dense.
    void bring(const Exec& ex, const Tensor& t) const;

private:
    std::shared_ptr<void> mark_;  // absent: not in a capture
};

}  // namespace ssm
