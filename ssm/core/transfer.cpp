#include "ssm/core/transfer.h"

#include <cstring>

#include "ssm/core/cuda/stream.h"

namespace ssm {

#if !defined(SSM_HAS_CUDA)
cuda::Event::~Event() = default;
#endif

namespace {

// Host memory of a tensor's size: pinned for a GPU, the tensor's own on the CPU.
std::shared_ptr<std::byte> host_memory(const Exec& ex, const Tensor& tensor) {
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::pinned_memory(std::max<size_t>(tensor.bytes(), 1));
    }
    return {tensor.raw(), [tensor](std::byte*) {}};
}

std::unique_ptr<cuda::Event> event_of(const Exec& ex) {
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return std::make_unique<cuda::Event>();
    }
    return nullptr;
}

}  // namespace

HostInput::HostInput(const Exec& ex, Shape shape, DType dtype)
    : ex_(ex),
      tensor_(Tensor::empty(ex, std::move(shape), dtype)),
      host_(host_memory(ex, tensor_)),
      sent_(event_of(ex)) {}
HostInput::~HostInput() = default;
HostInput::HostInput(HostInput&&) noexcept = default;
HostInput& HostInput::operator=(HostInput&&) noexcept = default;

void HostInput::wait() const {
    if constexpr (kHasCuda) {
        if (sent_) sent_->wait();
    }
}

void HostInput::send() {
    if constexpr (kHasCuda) {
        if (!sent_) return;
        cuda::copy_in_later(ex_, tensor_.raw(), host_.get(), tensor_.bytes());
        sent_->record(ex_);
    }
}

HostOutput::HostOutput(const Exec& ex, Shape shape)
    : ex_(ex),
      tensor_(Tensor::zeros(ex, std::move(shape))),
      host_(host_memory(ex, tensor_)),
      written_(event_of(ex)) {}
HostOutput::~HostOutput() = default;
HostOutput::HostOutput(HostOutput&&) noexcept = default;
HostOutput& HostOutput::operator=(HostOutput&&) noexcept = default;

void HostOutput::request() {
    if constexpr (kHasCuda) {
        if (!written_) return;
        cuda::copy_out_later(ex_, host_.get(), tensor_.raw(), tensor_.bytes());
        written_->record(ex_);
    }
}

std::span<const float> HostOutput::get() {
    if constexpr (kHasCuda) {
        if (written_) written_->wait();
    }
    return {reinterpret_cast<const float*>(host_.get()), static_cast<size_t>(tensor_.size())};
}

}  // namespace ssm
