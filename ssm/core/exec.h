// Exec: where and how an operator runs. Passed to every operator; there is no global state.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>

#include "ssm/core/allocator.h"
#include "ssm/core/error.h"

namespace ssm {

namespace cuda {
class Context;
}

// What a matrix product may round its f32 inputs to (accumulation is always f32).
enum class MatmulPrecision { f32, bf16 };

struct Exec {
    Device device = Device::cpu;
    int threads = 1;
    MatmulPrecision matmul = MatmulPrecision::f32;
    bool deterministic = false;  // on a GPU: the same bytes from run to run, where that costs time
    std::shared_ptr<Allocator> allocator = std::make_shared<Allocator>();
    std::shared_ptr<cuda::Context> cuda = nullptr;  // stream and handles; absent on the CPU
};

// Exec on the CPU with `threads` threads; 0 means every core this process may use.
Exec make_cpu_exec(int threads = 0);

// Exec on a GPU: its allocator's blocks are device memory. Throws Error (unsupported) without CUDA in this
// build, without a driver or device, and for a device older than compute capability 8.0.
Exec make_cuda_exec(int index = 0);

// Waits until everything asked of the device is done. Nothing on the CPU.
void synchronize(const Exec& ex);

// In an operator's front: throws when this build has no kernels for ex's device.
inline void require_device(std::string_view op, const Exec& ex) {
    if (!kHasCuda && ex.device == Device::cuda)
        fail(ErrorCode::unsupported, op, "this build has no CUDA kernels");
}

// Scratch memory of an operator: T[count], returned to the allocator at the end of the scope.
template <class T>
class Scratch {
public:
    Scratch(const Exec& ex, size_t count)
        : allocator_(ex.allocator.get()),
          data_(reinterpret_cast<T*>(allocator_->take(count * sizeof(T), capacity_))) {}
    ~Scratch() { allocator_->give(reinterpret_cast<std::byte*>(data_), capacity_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* data() const { return data_; }
    T& operator[](size_t i) const { return data_[i]; }

private:
    Allocator* allocator_;
    size_t capacity_ = 0;
    T* data_;
};

}  // namespace ssm
