#include "ssm/core/cuda/context.h"

#include "ssm/core/machine.h"

namespace ssm {
namespace cuda {

void check(cudaError_t status, std::string_view where) {
    if (status != cudaSuccess) fail(ErrorCode::io, where, "CUDA: {}", cudaGetErrorString(status));
}

Context::Context(int index) : index_(index) {
    check(cudaSetDevice(index), "device");
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, index), "device");
    check(cudaDeviceGetAttribute(&cache_bytes_, cudaDevAttrL2CacheSize, index), "device");
    for (cudaStream_t* stream : {&stream_, &branch_})
        check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "device");
    if (cublasLtCreate(&blas_) != CUBLAS_STATUS_SUCCESS)
        fail(ErrorCode::io, "device", "cuBLASLt does not start");
}

Context::~Context() {
    cublasLtDestroy(blas_);
    cudaStreamDestroy(branch_);
    cudaStreamDestroy(stream_);
}

std::byte* DeviceAllocator::allocate(size_t bytes) {
    void* p = nullptr;
    cudaError_t status = cudaMalloc(&p, bytes);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();  // it is reported here, not at the next launch
        trim();
        status = cudaMalloc(&p, bytes);
    }
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        fail(ErrorCode::io, "memory", "the GPU is full: {:.1f} MB are needed, {:.1f} of {:.1f} MB are free",
             static_cast<double>(bytes) * 1e-6, static_cast<double>(free) * 1e-6,
             static_cast<double>(total) * 1e-6);
    }
    check(status, "memory");
    return static_cast<std::byte*>(p);
}

void DeviceAllocator::release(std::byte* p, size_t) noexcept { cudaFree(p); }

void DeviceAllocator::zero(void* p, size_t bytes) {
    check(cudaMemsetAsync(p, 0, bytes, context_->stream()), "memory");
}
void DeviceAllocator::copy(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context_->stream()), "memory");
}
void DeviceAllocator::copy_in(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, context_->stream()), "memory");
}
void DeviceAllocator::copy_out(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, context_->stream()), "memory");
    check(cudaStreamSynchronize(context_->stream()), "memory");
}

}  // namespace cuda

std::vector<Gpu> list_gpus(std::string& why) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        why = status != cudaSuccess ? cudaGetErrorString(status) : "none listed";
    std::vector<Gpu> all;
    for (int i = 0; status == cudaSuccess && i < count; ++i) {
        cudaDeviceProp p{};
        cuda::check(cudaGetDeviceProperties(&p, i), "device");
        all.push_back({p.name, p.major, p.minor, p.multiProcessorCount, p.totalGlobalMem});
    }
    return all;
}

Exec make_cuda_exec(int index) {
    constexpr int kOldest = 80;
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver)
        fail(ErrorCode::unsupported, "device",
             "the NVIDIA driver is missing or older than this CUDA; use --device cpu");
    if (status != cudaSuccess || count == 0)
        fail(ErrorCode::unsupported, "device", "no NVIDIA GPU was found ({}); use --device cpu",
             status != cudaSuccess ? cudaGetErrorString(status) : "none listed");
    if (index < 0 || index >= count)
        fail(ErrorCode::unsupported, "device", "there is no GPU {}: this machine has {}", index, count);
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, index), "device");
    if (10 * properties.major + properties.minor < kOldest)
        fail(ErrorCode::unsupported, "device", "{} has compute capability {}.{}; 8.0 or newer is needed",
             properties.name, properties.major, properties.minor);
    Exec ex;
    ex.device = Device::cuda;
    ex.cuda = std::make_shared<cuda::Context>(index);
    ex.allocator = std::make_shared<cuda::DeviceAllocator>(ex.cuda);
    return ex;
}

void synchronize(const Exec& ex) {
    if (ex.cuda) cuda::check(cudaStreamSynchronize(ex.cuda->stream()), "device");
}

}  // namespace ssm
