// Replay: device work that is asked for again and again in the same form, a training step for example. On a
// GPU it is captured as a CUDA graph the second time and launched whole from then on, which leaves the host
// nothing to do between its kernels; on the CPU it just runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "ssm/core/exec.h"

namespace ssm {

namespace cuda {
class Graph;
}

class Replay {
public:
    explicit Replay(Exec ex);
    ~Replay();

    // `key`: everything that decides what `work` asks for (shapes, say); what else differs from run to run is
    // read from device memory. `work` neither waits for the device nor copies between it and the host.
    void run(const std::vector<int64_t>& key, const std::function<void()>& work);
    bool captured() const { return graph_ != nullptr; }

private:
    Exec ex_;
    std::vector<int64_t> key_;
    bool met_ = false;
    std::unique_ptr<cuda::Graph> graph_;
};

}  // namespace ssm
