// Small arrays that go to a device and come from it in every step, while the device goes on working. On the
// CPU they are the same memory.
#pragma once

#include <memory>
#include <span>

#include "ssm/core/tensor.h"

namespace ssm {

namespace cuda {
class Event;
}

// A tensor that the host writes anew in each step.
class HostInput {
public:
    HostInput(const Exec& ex, Shape shape, DType dtype);
    ~HostInput();
    HostInput(HostInput&&) noexcept;
    HostInput& operator=(HostInput&&) noexcept;

    // The host's memory, to be written; waits until the last send() was read.
    template <class T>
    std::span<T> fill() {
        wait();
        return {reinterpret_cast<T*>(host_.get()), static_cast<size_t>(tensor_.size())};
    }
    void send();  // in the stream's order
    const Tensor& tensor() const { return tensor_; }

private:
    void wait() const;
    Exec ex_;
    Tensor tensor_;
    std::shared_ptr<std::byte> host_;
    std::unique_ptr<cuda::Event> sent_;
};

// A tensor that the host reads some time after the device has written it.
class HostOutput {
public:
    HostOutput(const Exec& ex, Shape shape);  // f32
    ~HostOutput();
    HostOutput(HostOutput&&) noexcept;
    HostOutput& operator=(HostOutput&&) noexcept;

    const Tensor& tensor() const { return tensor_; }
    void request();                // what it holds at this point of the stream
    std::span<const float> get();  // what the last request() asked for; waits for it

private:
    Exec ex_;
    Tensor tensor_;
    std::shared_ptr<std::byte> host_;
    std::unique_ptr<cuda::Event> written_;
};

}  // namespace ssm
