#include "ssm/core/cuda/stream.h"

#include "ssm/core/cuda/context.h"

namespace ssm::cuda {

std::shared_ptr<std::byte> pinned_memory(size_t bytes) {
    void* p = nullptr;
    check(cudaMallocHost(&p, bytes), "memory");
    return {static_cast<std::byte*>(p), [](std::byte* q) { cudaFreeHost(q); }};
}

void copy_in_later(const Exec& ex, void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(ex)), "memory");
}

void copy_out_later(const Exec& ex, void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(ex)), "memory");
}

Event::Event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "device");
    event_ = event;
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }
void Event::record(const Exec& ex) {
    check(cudaEventRecord(static_cast<cudaEvent_t>(event_), stream_of(ex)), "device");
}
void Event::wait() const { check(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)), "device"); }

// Relaxed: an allocation that the pool cannot serve is made at once and is not part of the graph.
Graph::Graph(const Exec& ex, const std::function<void()>& ask) : ex_(ex) {
    cudaGraph_t graph = nullptr;
    ex_.allocator->start_withholding();
    check(cudaStreamBeginCapture(stream_of(ex_), cudaStreamCaptureModeRelaxed), "graph");
    try {
        ask();
    } catch (...) {
        cudaStreamEndCapture(stream_of(ex_), &graph);
        if (graph != nullptr) cudaGraphDestroy(graph);
        ex_.allocator->give_back(ex_.allocator->stop_withholding());
        throw;
    }
    const cudaError_t captured = cudaStreamEndCapture(stream_of(ex_), &graph);
    memory_ = ex_.allocator->stop_withholding();
    cudaGraphExec_t runnable = nullptr;
    const cudaError_t made = captured == cudaSuccess ? cudaGraphInstantiate(&runnable, graph, 0) : captured;
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (made != cudaSuccess) ex_.allocator->give_back(std::move(memory_));
    check(made, "graph");
    graph_ = runnable;
}

Graph::~Graph() {
    cudaStreamSynchronize(stream_of(ex_));
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
    ex_.allocator->give_back(std::move(memory_));
}

void Graph::launch() const {
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), stream_of(ex_)), "graph");
}

}  // namespace ssm::cuda
