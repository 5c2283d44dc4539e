#include "ssm/core/replay.h"

namespace ssm {

// The first run of a key allocates and chooses algorithms, which a capture could not.
void Replay::run(const std::vector<int64_t>& key, const std::function<void()>& work) {
    if constexpr (kHasCuda) {
        if (ex_.device == Device::cuda) {
            if (!met_ || key != key_) {
                graph_ = {};
                key_ = key;
                met_ = true;
                return work();
            }
            if (!graph_) graph_ = Graph::capture(ex_, work);
            return graph_.launch(ex_);
        }
    }
    work();
}

}  // namespace ssm
