// Tensor: a dtype, a shape and shared storage. Row-major; the first dimension may have a stride, the rest
// is dense (view.h). Copying a Tensor shares its storage. It lies on the device of the Exec that made it;
// operators want all of theirs on one device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "ssm/core/dtype.h"
#include "ssm/core/error.h"
#include "ssm/core/exec.h"
#include "ssm/core/view.h"

namespace ssm {

using Shape = std::vector<int64_t>;

// Product of the dimensions; throws when one is negative or the product overflows.
int64_t element_count(const Shape& shape);
// "[2, 3]". In the message of a check write "[{}]" and fmt::join(shape, ", "): free unless the check fails.
std::string to_string(const Shape& shape);

class Tensor {
public:
    Tensor() = default;  // empty: `if (!t)`

    // From the Exec's allocator (activations) or from the system (parameters). Content undefined.
    static Tensor empty(const Exec& ex, Shape shape, DType dtype = DType::f32);
    static Tensor empty(Shape shape, DType dtype = DType::f32);
    static Tensor zeros(const Exec& ex, Shape shape, DType dtype = DType::f32);
    static Tensor zeros(Shape shape, DType dtype = DType::f32);
    // Borrowed host memory; `keep_alive` owns it (a mapped file, say).
    static Tensor wrap(void* data, Shape shape, DType dtype, std::shared_ptr<void> keep_alive);
    static Tensor from_floats(Shape shape, const std::vector<float>& values);

    explicit operator bool() const { return data_ != nullptr; }
    DType dtype() const { return dtype_; }
    Device device() const { return device_; }
    const Shape& shape() const { return shape_; }
    int rank() const { return static_cast<int>(shape_.size()); }
    int64_t dim(int i) const { return shape_.at(i < 0 ? shape_.size() + i : i); }
    int64_t stride() const { return stride_; }
    int64_t size() const { return element_count(shape_); }
    size_t bytes() const { return static_cast<size_t>(size()) * size_of(dtype_); }
    bool dense() const;
    std::byte* raw() const { return data_; }

    // The typed view; throws when T or R does not match. R = 1 flattens a dense tensor of any rank.
    template <class T, int R>
    View<T, R> view() const {
        using Plain = std::remove_const_t<T>;
        require(dtype_ == dtype_of<Plain>, "tensor", "dtype is {} where {} was expected", name_of(dtype_),
                name_of(dtype_of<Plain>));
        if constexpr (R == 1) {
            require(dense(), "tensor", "[{}] is a strided slice where a dense tensor was expected",
                    fmt::join(shape_, ", "));
            return View<T, 1>(reinterpret_cast<T*>(data_), {size()}, 1);
        } else {
            require(rank() == R, "tensor", "rank of [{}] is not {}", fmt::join(shape_, ", "), R);
            std::array<int64_t, R> s{};
            for (int i = 0; i < R; ++i) s[i] = shape_[i];
            return View<T, R>(reinterpret_cast<T*>(data_), s, stride_);
        }
    }
    // An absent optional argument stays absent.
    template <class T, int R>
    View<T, R> view_if() const {
        return *this ? view<T, R>() : View<T, R>{};
    }
    // First element of a dense tensor in the host's memory.
    template <class T>
    T* data() const {
        require(device_ == Device::cpu, "tensor", "the tensor is on the GPU where the CPU reads it");
        return view<T, 1>().data;
    }
    float item() const;  // of a tensor with one f32 element; waits for the device

    // Same storage, other window or shape.
    Tensor columns(int64_t begin, int64_t end) const;  // of a matrix: [t d] -> [t end-begin], strided
    Tensor rows(int64_t begin, int64_t end) const;     // of the first dimension
    Tensor reshape(Shape shape) const;  // a strided slice may only split or join its inner dimensions
    // New storage.
    Tensor clone() const;             // on the same device
    Tensor to(const Exec& ex) const;  // dense, on ex's device; the same tensor if it is there
    Tensor to_host() const;           // the same tensor if it is there; else waits for the copy
    Tensor to(
        DType dtype) const;  // f32 <-> bf16, f16 -> f32, f64 -> f32; the same tensor if equal; host only
    void fill_zero() const;
    void copy_from(const Tensor& other) const;  // same dtype and shape; from any device to any

private:
    static Tensor empty(const std::shared_ptr<Allocator>& pool, Shape shape, DType dtype);
    void copy_bytes(std::byte* to, const Tensor& from, const std::byte* at, size_t bytes) const;

    std::shared_ptr<void> storage_;
    std::shared_ptr<Allocator> pool_;  // of the GPU; absent for host memory
    std::byte* data_ = nullptr;
    DType dtype_ = DType::f32;
    Device device_ = Device::cpu;
    Shape shape_;
    int64_t stride_ = 0;
};

// Numbers in host memory as a tensor on ex's device.
template <class T>
Tensor on_device_of(const Exec& ex, View<const T, 1> values) {
    const Tensor host = Tensor::empty({values.shape[0]}, dtype_of<T>);
    for (int64_t i = 0; i < values.shape[0]; ++i) host.data<T>()[i] = values(i);
    return host.to(ex);
}

float f16_to_float(uint16_t bits);

}  // namespace ssm
