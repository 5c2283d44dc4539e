#include "ssm/core/graph.h"

#include "ssm/core/cuda/context.h"

namespace ssm {

Graph Graph::capture(const Exec& ex, const std::function<void()>& work) {
    require(ex.device == Device::cuda, "graph", "only a GPU's work can be captured");
    const cudaStream_t stream = cuda::stream_of(ex);
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "graph");
    cudaGraph_t graph = nullptr;
    try {
        work();
    } catch (...) {
        cudaStreamEndCapture(stream, &graph);
        if (graph != nullptr) cudaGraphDestroy(graph);
        cudaGetLastError();
        throw;
    }
    cuda::check(cudaStreamEndCapture(stream, &graph), "graph");
    cudaGraphExec_t replay = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&replay, graph, 0);
    cudaGraphDestroy(graph);
    cuda::check(status, "graph");
    Graph g;
    g.handle_ =
        std::shared_ptr<void>(replay, [](void* p) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(p)); });
    return g;
}

void Graph::launch(const Exec& ex) const {
    require(handle_ != nullptr, "graph", "nothing was captured");
    cuda::check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_.get()), cuda::stream_of(ex)), "graph");
}

Exec with_own_memory(const Exec& ex) {
    Exec own = ex;
    if (ex.device == Device::cuda) {
        own.allocator = std::make_shared<cuda::DeviceAllocator>(ex.cuda);
    } else {
        own.allocator = std::make_shared<Allocator>();
    }
    return own;
}

}  // namespace ssm
