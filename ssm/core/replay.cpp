#include "ssm/core/replay.h"

#include "ssm/core/cuda/stream.h"

namespace ssm {

#if !defined(SSM_HAS_CUDA)
cuda::Graph::~Graph() = default;
#endif

Replay::Replay(Exec ex) : ex_(std::move(ex)) {}
Replay::~Replay() = default;

// The first run of a key allocates and chooses algorithms, which a capture could not.
void Replay::run(const std::vector<int64_t>& key, const std::function<void()>& work) {
    if constexpr (kHasCuda) {
        if (ex_.device == Device::cuda) {
            if (!met_ || key != key_) {
                graph_.reset();
                key_ = key;
                met_ = true;
                return work();
            }
            if (!graph_) graph_ = std::make_unique<cuda::Graph>(ex_, work);
            return graph_->launch();
        }
    }
    work();
}

}  // namespace ssm
