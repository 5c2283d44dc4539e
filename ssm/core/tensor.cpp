#include "ssm/core/tensor.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace ssm {
namespace {

int64_t dense_stride(const Shape& shape) {
    int64_t n = 1;
    for (size_t i = 1; i < shape.size(); ++i) n *= shape[i];
    return n;
}

template <class From, class To>
void convert(const Tensor& from, const Tensor& to) {
    const auto* a = from.data<const From>();
    auto* b = to.data<To>();
    for (int64_t i = 0, n = from.size(); i < n; ++i) b[i] = static_cast<To>(static_cast<float>(a[i]));
}

}  // namespace

int64_t element_count(const Shape& shape) {
    int64_t n = 1;
    for (int64_t d : shape) {
        require(d >= 0, "tensor", "shape [{}] has a negative dimension", fmt::join(shape, ", "));
        require(d == 0 || n <= std::numeric_limits<int64_t>::max() / d, "tensor", "shape [{}] overflows",
                fmt::join(shape, ", "));
        n *= d;
    }
    return n;
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

Tensor Tensor::empty(const std::shared_ptr<Allocator>& pool, Shape shape, DType dtype) {
    Tensor t;
    const size_t bytes = static_cast<size_t>(element_count(shape)) * size_of(dtype);
    size_t capacity = 0;
    std::byte* p = pool->take(bytes, capacity);
    t.storage_ = std::shared_ptr<void>(
        p, [pool, capacity](void* q) { pool->give(static_cast<std::byte*>(q), capacity); });
    t.data_ = p;
    t.dtype_ = dtype;
    t.device_ = pool->device();
    if (t.device_ != Device::cpu) t.pool_ = pool;
    t.stride_ = dense_stride(shape);
    t.shape_ = std::move(shape);
    return t;
}

Tensor Tensor::empty(const Exec& ex, Shape shape, DType dtype) {
    return empty(ex.allocator, std::move(shape), dtype);
}

Tensor Tensor::empty(Shape shape, DType dtype) {
    Tensor t;
    const size_t bytes = static_cast<size_t>(element_count(shape)) * size_of(dtype);
    std::byte* p = allocate_aligned(bytes);
    t.storage_ =
        std::shared_ptr<void>(p, [bytes](void* q) { free_aligned(static_cast<std::byte*>(q), bytes); });
    t.data_ = p;
    t.dtype_ = dtype;
    t.stride_ = dense_stride(shape);
    t.shape_ = std::move(shape);
    return t;
}

Tensor Tensor::zeros(const Exec& ex, Shape shape, DType dtype) {
    Tensor t = empty(ex, std::move(shape), dtype);
    t.fill_zero();
    return t;
}

Tensor Tensor::zeros(Shape shape, DType dtype) {
    Tensor t = empty(std::move(shape), dtype);
    t.fill_zero();
    return t;
}

Tensor Tensor::wrap(void* data, Shape shape, DType dtype, std::shared_ptr<void> keep_alive) {
    Tensor t;
    t.storage_ = std::move(keep_alive);
    t.data_ = static_cast<std::byte*>(data);
    t.dtype_ = dtype;
    t.stride_ = dense_stride(shape);
    t.shape_ = std::move(shape);
    return t;
}

Tensor Tensor::from_floats(Shape shape, const std::vector<float>& values) {
    Tensor t = empty(std::move(shape), DType::f32);
    require(t.size() == static_cast<int64_t>(values.size()), "tensor", "{} values do not fill [{}]",
            values.size(), fmt::join(t.shape(), ", "));
    if (!values.empty()) std::memcpy(t.data_, values.data(), t.bytes());
    return t;
}

bool Tensor::dense() const { return shape_.empty() || shape_[0] <= 1 || stride_ == dense_stride(shape_); }

float Tensor::item() const {
    require(size() == 1, "tensor", "[{}] does not have one element", fmt::join(shape_, ", "));
    return *to_host().data<const float>();
}

Tensor Tensor::columns(int64_t begin, int64_t end) const {
    require(rank() == 2 && 0 <= begin && begin <= end && end <= shape_[1], "tensor",
            "no columns {}:{} in [{}]", begin, end, fmt::join(shape_, ", "));
    Tensor t = *this;
    t.data_ += begin * static_cast<int64_t>(size_of(dtype_));
    t.shape_[1] = end - begin;
    return t;
}

Tensor Tensor::rows(int64_t begin, int64_t end) const {
    require(rank() >= 1 && 0 <= begin && begin <= end && end <= shape_[0], "tensor", "no rows {}:{} in [{}]",
            begin, end, fmt::join(shape_, ", "));
    Tensor t = *this;
    t.data_ += begin * stride_ * static_cast<int64_t>(size_of(dtype_));
    t.shape_[0] = end - begin;
    return t;
}

Tensor Tensor::reshape(Shape shape) const {
    const bool inner_only = !dense() && !shape.empty() && shape[0] == shape_[0];
    require(element_count(shape) == size() && (dense() || inner_only), "tensor",
            "cannot reshape {}[{}] to [{}]", dense() ? "" : "strided ", fmt::join(shape_, ", "),
            fmt::join(shape, ", "));
    Tensor t = *this;
    t.stride_ = inner_only ? stride_ : dense_stride(shape);
    t.shape_ = std::move(shape);
    return t;
}

Tensor Tensor::clone() const {
    Tensor t = pool_ ? empty(pool_, shape_, dtype_) : empty(shape_, dtype_);
    t.copy_from(*this);
    return t;
}

Tensor Tensor::to(const Exec& ex) const {
    if (ex.device == device_) return *this;
    if (ex.device == Device::cpu) return to_host();
    Tensor t = empty(ex, shape_, dtype_);
    t.copy_from(*this);
    return t;
}

Tensor Tensor::to_host() const {
    if (device_ == Device::cpu) return *this;
    Tensor t = empty(shape_, dtype_);
    t.copy_from(*this);
    return t;
}

Tensor Tensor::to(DType dtype) const {
    if (dtype == dtype_) return *this;
    require(device_ == Device::cpu, "tensor", "types are converted on the CPU but the tensor is on the GPU");
    const Tensor from = dense() ? *this : clone();
    Tensor t = empty(shape_, dtype);
    if (dtype_ == DType::bf16 && dtype == DType::f32) {
        convert<bf16, float>(from, t);
    } else if (dtype_ == DType::f32 && dtype == DType::bf16) {
        convert<float, bf16>(from, t);
    } else if (dtype_ == DType::f64 && dtype == DType::f32) {
        convert<double, float>(from, t);
    } else if (dtype_ == DType::f16 && (dtype == DType::f32 || dtype == DType::bf16)) {
        const auto* a = reinterpret_cast<const uint16_t*>(from.raw());
        for (int64_t i = 0, n = size(); i < n; ++i) {
            const float x = f16_to_float(a[i]);
            if (dtype == DType::f32)
                t.data<float>()[i] = x;
            else
                t.data<bf16>()[i] = bf16(x);
        }
    } else {
        fail(ErrorCode::unsupported, "tensor", "no conversion from {} to {}", name_of(dtype_),
             name_of(dtype));
    }
    return t;
}

void Tensor::fill_zero() const {
    if (size() == 0) return;
    const auto zero = [&](std::byte* p, size_t bytes) {
        if (pool_)
            pool_->zero(p, bytes);
        else
            std::memset(p, 0, bytes);
    };
    if (dense()) return zero(data_, bytes());
    const auto row = static_cast<size_t>(dense_stride(shape_)) * size_of(dtype_);
    for (int64_t i = 0; i < shape_[0]; ++i) {
        zero(data_ + i * stride_ * static_cast<int64_t>(size_of(dtype_)), row);
    }
}

void Tensor::copy_bytes(std::byte* to, const Tensor& from, const std::byte* at, size_t bytes) const {
    if (pool_ && from.pool_)
        pool_->copy(to, at, bytes);
    else if (pool_)
        pool_->copy_in(to, at, bytes);
    else if (from.pool_)
        from.pool_->copy_out(to, at, bytes);
    else
        std::memcpy(to, at, bytes);
}

void Tensor::copy_from(const Tensor& other) const {
    require(dtype_ == other.dtype_ && shape_ == other.shape_, "tensor", "cannot copy {} [{}] into {} [{}]",
            name_of(other.dtype_), fmt::join(other.shape_, ", "), name_of(dtype_), fmt::join(shape_, ", "));
    if (size() == 0) return;
    if (dense() && other.dense()) return copy_bytes(data_, other, other.data_, bytes());
    const auto item = static_cast<int64_t>(size_of(dtype_));
    const int64_t row = dense_stride(shape_) * item;
    for (int64_t i = 0; i < shape_[0]; ++i) {
        copy_bytes(data_ + i * stride_ * item, other, other.data_ + i * other.stride_ * item,
                   static_cast<size_t>(row));
    }
}

float f16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const int exponent = (bits >> 10) & 31;
    const uint32_t mantissa = bits & 1023u;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return sign != 0 ? -magnitude : magnitude;
}

}  // namespace ssm
