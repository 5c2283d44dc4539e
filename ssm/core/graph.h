// Work that an Exec's device was asked for once, to be asked for again in one call: a CUDA graph.
#pragma once

#include <functional>
#include <memory>

#include "ssm/core/exec.h"

namespace ssm {

class Graph {
public:
    Graph() = default;
    explicit operator bool() const { return handle_ != nullptr; }

    // What `work` asks of ex's device, without doing it. `work` must have run once before (what is made at
    // the first call is made then) and may not wait for the device. The memory that it takes from ex's
    // allocator and gives back is the graph's, until the last copy of it goes. Throws Error (unsupported) on
    // the CPU.
    static Graph capture(const Exec& ex, const std::function<void()>& work);
    // Does it. Pointers are those of the capture.
    void launch(const Exec& ex) const;

private:
    std::shared_ptr<void> handle_;
};

}  // namespace ssm
