// A GPU as the kernels' launchers see it: stream, handles, memory. Included by CUDA sources only.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <memory>
#include <mutex>
#include <string_view>

#include "ssm/core/error.h"
#include "ssm/core/exec.h"

namespace ssm::cuda {

// Throws Error (io) when a call of CUDA's runtime failed: "[where] CUDA: what it says".
void check(cudaError_t status, std::string_view where);

// After a launch: throws if it was refused.
inline void check_launch(std::string_view op) { check(cudaGetLastError(), op); }

class Context {
public:
    explicit Context(int index);
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;
    ~Context();

    cudaStream_t stream() const { return stream_; }
    cublasLtHandle_t blas() const { return blas_; }
    int multiprocessors() const { return multiprocessors_; }
    int index() const { return index_; }
    int64_t cache_bytes() const { return cache_bytes_; }  // L2's
    // A second stream, for branches of a graph under capture; whether this one has any yet.
    cudaStream_t branch() const { return branch_; }
    bool branched = false;

    // ops/linear's: how it runs the products it has met. Used under the mutex.
    std::mutex products_mutex;
    std::shared_ptr<void> products;

private:
    int index_ = 0, multiprocessors_ = 0, cache_bytes_ = 0;
    cudaStream_t stream_ = nullptr, branch_ = nullptr;
    cublasLtHandle_t blas_ = nullptr;
};

// Device memory, all of it used in the order of one stream.
class DeviceAllocator final : public Allocator {
public:
    explicit DeviceAllocator(std::shared_ptr<Context> context) : context_(std::move(context)) {}
    ~DeviceAllocator() override { trim(); }
    Device device() const override { return Device::cuda; }
    void zero(void* p, size_t bytes) override;
    void copy(void* to, const void* from, size_t bytes) override;
    void copy_in(void* to, const void* from, size_t bytes) override;
    void copy_out(void* to, const void* from, size_t bytes) override;

protected:
    std::byte* allocate(size_t bytes) override;
    void release(std::byte* p, size_t bytes) noexcept override;
    size_t smallest_piece() const override { return size_t{1} << 20; }

private:
    std::shared_ptr<Context> context_;
};

// Before the end of a capture: the stream waits for the branches. prefetch.cu.
void join_branch(const Exec& ex);

inline cudaStream_t stream_of(const Exec& ex) { return ex.cuda->stream(); }

}  // namespace ssm::cuda
