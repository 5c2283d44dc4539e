#include "ssm/core/graph.h"

#include "ssm/core/cuda/context.h"

namespace ssm {

namespace {

// A graph that can be launched, and the blocks that it writes.
struct Captured {
    Exec ex;
    cudaGraphExec_t graph = nullptr;
    std::vector<Allocator::Block> memory;

    explicit Captured(const Exec& exec) : ex(exec) {}
    Captured(const Captured&) = delete;
    Captured& operator=(const Captured&) = delete;
    ~Captured() {
        if (graph != nullptr) {
            cudaStreamSynchronize(cuda::stream_of(ex));
            cudaGraphExecDestroy(graph);
        }
        ex.allocator->give_back(std::move(memory));
    }
};

// Relaxed: an allocation that the pool cannot serve is made at once and is not part of the graph.
cudaGraph_t record(const Exec& ex, const std::function<void()>& work) {
    const cudaStream_t stream = cuda::stream_of(ex);
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "graph");
    cudaGraph_t graph = nullptr;
    try {
        work();
        cuda::join_branch(ex);
    } catch (...) {
        ex.cuda->branched = false;
        cudaStreamEndCapture(stream, &graph);
        if (graph != nullptr) cudaGraphDestroy(graph);
        cudaGetLastError();
        throw;
    }
    cuda::check(cudaStreamEndCapture(stream, &graph), "graph");
    return graph;
}

}  // namespace

Graph Graph::capture(const Exec& ex, const std::function<void()>& work) {
    require(ex.device == Device::cuda, "graph", "only a GPU's work can be captured");
    auto captured = std::make_shared<Captured>(ex);
    ex.allocator->start_withholding();
    cudaGraph_t graph = nullptr;
    try {
        graph = record(ex, work);
    } catch (...) {
        captured->memory = ex.allocator->stop_withholding();
        throw;
    }
    captured->memory = ex.allocator->stop_withholding();
    const cudaError_t status = cudaGraphInstantiate(&captured->graph, graph, 0);
    cudaGraphDestroy(graph);
    cuda::check(status, "graph");
    Graph g;
    g.handle_ = captured;
    return g;
}

void Graph::launch(const Exec& ex) const {
    require(handle_ != nullptr, "graph", "nothing was captured");
    cuda::check(cudaGraphLaunch(static_cast<const Captured*>(handle_.get())->graph, cuda::stream_of(ex)),
                "graph");
}

}  // namespace ssm
