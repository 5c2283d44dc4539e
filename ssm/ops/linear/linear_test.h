// What the tests of linear on a CPU multiply: matrices with NaN around them.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "ssm/core/tensor.h"
#include "tests/support/compare.h"

namespace ssm::test {

// A matrix whose rows have a gap of `gap` elements and whose first element is misaligned by one element.
// The gap holds NaN: reading it shows, writing it too.
struct TestMatrix {
    Tensor storage, tensor;
    int64_t rows, columns, stride;

    TestMatrix(int64_t r, int64_t c, DType dtype, int64_t gap) : rows(r), columns(c), stride(c + gap) {
        storage = Tensor::empty({rows * stride + 1}, dtype);
        for (int64_t i = 0; i < storage.size(); ++i) set(i, NAN);
        const Tensor all = Tensor::wrap(storage.raw() + size_of(dtype), {rows, stride}, dtype,
                                        std::make_shared<Tensor>(storage));
        tensor = all.columns(0, columns);
    }
    void set(int64_t i, float v) const {
        if (storage.dtype() == DType::f32)
            storage.data<float>()[i] = v;
        else
            storage.data<bf16>()[i] = bf16(v);
    }
    float get(int64_t i) const {
        return storage.dtype() == DType::f32 ? storage.data<float>()[i]
                                             : static_cast<float>(storage.data<bf16>()[i]);
    }
    void fill(const std::vector<float>& v) const {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                set(1 + r * stride + c, v[static_cast<size_t>(r * columns + c)]);
    }
    std::vector<float> values() const {
        std::vector<float> v;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) v.push_back(get(1 + r * stride + c));
        return v;
    }
    bool gaps_untouched() const {
        if (!std::isnan(get(0))) return false;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = columns; c < stride; ++c)
                if (!std::isnan(get(1 + r * stride + c))) return false;
        return true;
    }
    View<float, 2> view() const { return tensor.view<float, 2>(); }
};

inline TestMatrix random_matrix(Random& random, int64_t r, int64_t c, DType dtype, int64_t gap) {
    TestMatrix m(r, c, dtype, gap);
    m.fill(random.vector(r * c));
    return m;
}

}  // namespace ssm::test
