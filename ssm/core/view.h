// View<T, R>: a borrowed array of R dimensions, row-major. The first dimension may have a stride
// (`stride` elements from one row to the next); everything inside a row is dense. That one stride is
// enough for every split of a projection's output: x = xz[:, :d] is {xz, {t, d}, 2*d}.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "ssm/core/error.h"

namespace ssm {

template <class T, int R>
struct View {
    static_assert(R >= 1);
    T* data = nullptr;
    std::array<int64_t, R> shape{};
    int64_t stride = 0;  // elements between consecutive rows (first dimension)

    View() = default;
    // Dense.
    View(T* p, std::array<int64_t, R> s) : data(p), shape(s), stride(1) {
        for (int i = 1; i < R; ++i) stride *= s[i];
    }
    View(T* p, std::array<int64_t, R> s, int64_t row_stride) : data(p), shape(s), stride(row_stride) {}
    // View<float> converts to View<const float>.
    template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>) View(const View<U, R>& v)
        : data(v.data), shape(v.shape), stride(v.stride) {}  // NOLINT(google-explicit-constructor)

    // False for an absent optional argument.
    explicit operator bool() const { return data != nullptr; }

    int64_t row_size() const {
        int64_t n = 1;
        for (int i = 1; i < R; ++i) n *= shape[i];
        return n;
    }
    int64_t size() const { return shape[0] * row_size(); }
    bool dense() const { return shape[0] <= 1 || stride == row_size(); }
    T* row(int64_t i) const { return data + i * stride; }

    template <class... I>
    requires(sizeof...(I) == R) T& operator()(I... index) const {
        const std::array<int64_t, R> at{static_cast<int64_t>(index)...};
        int64_t inner = 0;
        for (int i = 1; i < R; ++i) inner = inner * shape[i] + at[i];
        return data[at[0] * stride + inner];
    }
    std::string shape_string() const { return fmt::format("[{}]", fmt::join(shape, ", ")); }
};

// Throws unless `v` has the shape `want`: "[op] `name` must be [d n] = [4, 2] but is [2, 4]".
template <class T, int R>
void require_shape(std::string_view op, std::string_view name, std::string_view letters, const View<T, R>& v,
                   std::type_identity_t<std::array<int64_t, R>> want) {
    if (v.data != nullptr && v.shape == want) return;
    fail(ErrorCode::invalid_argument, op, "`{}` must be [{}] = [{}] but is {}", name, letters,
         fmt::join(want, ", "), v.data ? v.shape_string() : std::string("absent"));
}
// The same for an optional argument: absent is fine.
template <class T, int R>
void require_shape_if(std::string_view op, std::string_view name, std::string_view letters,
                      const View<T, R>& v, std::type_identity_t<std::array<int64_t, R>> want) {
    if (v) require_shape(op, name, letters, v, want);
}

}  // namespace ssm
