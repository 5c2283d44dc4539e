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

}  // namespace ssm::cuda
