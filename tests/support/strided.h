// Strided rows for tests.
#pragma once

#include <cstdint>
#include <vector>

#include "ssm/core/view.h"

namespace ssm::test {

// A matrix inside a wider one, at an odd offset: rows are strided and misaligned. Gaps hold `gap`.
template <class T>
struct Strided {
    int64_t t, d, stride, offset;
    std::vector<T> storage;

    Strided(int64_t rows, int64_t width, float gap, bool strided = true)
        : t(rows),
          d(width),
          stride(strided ? width + 3 : width),
          offset(strided ? 1 : 0),
          storage(static_cast<size_t>(rows * stride + offset + 1), static_cast<T>(gap)) {}
    T* row(int64_t i) { return storage.data() + offset + i * stride; }
    View<T, 2> view() { return {storage.data() + offset, {t, d}, stride}; }
    std::vector<T> values() {
        std::vector<T> v;
        for (int64_t i = 0; i < t; ++i) v.insert(v.end(), row(i), row(i) + d);
        return v;
    }
    void assign(const std::vector<float>& v) {
        for (int64_t i = 0; i < t * d; ++i) row(i / d)[i % d] = static_cast<T>(v[static_cast<size_t>(i)]);
    }
    // True when every element outside the rows is still `gap`.
    bool gaps_untouched(float gap) {
        std::vector<bool> inside(storage.size(), false);
        for (int64_t i = 0; i < t * d; ++i) {
            inside[static_cast<size_t>(offset + i / d * stride + i % d)] = true;
        }
        for (size_t i = 0; i < storage.size(); ++i) {
            if (!inside[i] && static_cast<float>(storage[i]) != gap) return false;
        }
        return true;
    }
};

}  // namespace ssm::test
