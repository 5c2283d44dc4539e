// Matrix product without oneDNN: for WebAssembly and machines where it is not installed.
//
// The classic scheme: B is packed in panels [k][2N], A in panels [k][kRows], both f32; a register block of
// kRows x 2N accumulates over kDepth values of k; threads share the columns of C. The sum over k runs in
// order, so the result does not depend on threads.
#include <vector>

#include "ssm/core/parallel.h"
#include "ssm/ops/linear/linear_impl.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/linear/linear_plain_cpu.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ssm::linear_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// 2 kRows accumulators, 2 vectors of B and one of A fit the registers: 32 (AVX-512, NEON) or 16.
constexpr int kRows = HWY_TARGET <= HWY_AVX3 || HWY_TARGET >= HWY_NEON ? 12 : 6;
constexpr int64_t kDepth = 256;

template <class T>
HWY_INLINE float At(const Matrix& m, int64_t row, int64_t column) {
    const T* data = static_cast<const T*>(m.data);
    return static_cast<float>(m.transpose ? data[column * m.stride + row] : data[row * m.stride + column]);
}

// panel[kk][j] = B[k0 + kk][n0 + j], zeros past the last column.
template <class T>
void PackB(const Product& p, int64_t k0, int64_t depth, int64_t n0, int64_t width, float* panel) {
    const int64_t columns = std::min(width, p.n - n0);
    for (int64_t kk = 0; kk < depth; ++kk) {
        for (int64_t j = 0; j < width; ++j) {
            panel[kk * width + j] = j < columns ? At<T>(p.b, k0 + kk, n0 + j) : 0.0f;
        }
    }
}

template <class T>
void PackA(const Product& p, int64_t k0, int64_t depth, int64_t m0, float* panel) {
    const int64_t rows = std::min<int64_t>(kRows, p.m - m0);
    for (int64_t kk = 0; kk < depth; ++kk) {
        for (int64_t i = 0; i < kRows; ++i) {
            panel[kk * kRows + i] = i < rows ? p.alpha * At<T>(p.a, m0 + i, k0 + kk) : 0.0f;
        }
    }
}

// c[kRows][2N] += A panel x B panel, c dense.
HWY_INLINE void Block(int64_t depth, const float* a, const float* b, float* c) {
    const DF d;
    const auto n = static_cast<int64_t>(hn::Lanes(d));
    VF left[kRows], right[kRows];
    for (int i = 0; i < kRows; ++i) {
        left[i] = hn::Load(d, c + i * 2 * n);
        right[i] = hn::Load(d, c + i * 2 * n + n);
    }
    for (int64_t kk = 0; kk < depth; ++kk, a += kRows, b += 2 * n) {
        const VF b0 = hn::Load(d, b), b1 = hn::Load(d, b + n);
        for (int i = 0; i < kRows; ++i) {
            const VF x = hn::Set(d, a[i]);
            left[i] = hn::MulAdd(x, b0, left[i]);
            right[i] = hn::MulAdd(x, b1, right[i]);
        }
    }
    for (int i = 0; i < kRows; ++i) {
        hn::Store(left[i], d, c + i * 2 * n);
        hn::Store(right[i], d, c + i * 2 * n + n);
    }
}

// The running sums of C's panel [m][width] start as beta C + bias and end in C.
template <class C>
void LoadPanel(const Product& p, int64_t n0, int64_t width, float* sums) {
    for (int64_t i = 0; i < p.m; ++i) {
        const C* c = static_cast<const C*>(p.c) + i * p.c_stride + n0;
        for (int64_t j = 0; j < width; ++j) {
            const bool inside = n0 + j < p.n;
            float value = inside && p.bias != nullptr ? p.bias[n0 + j] : 0.0f;
            if (inside && p.beta != 0.0f) value += p.beta * static_cast<float>(c[j]);
            sums[i * width + j] = value;
        }
    }
}

template <class C>
void StorePanel(const Product& p, int64_t n0, int64_t width, const float* sums) {
    const int64_t columns = std::min(width, p.n - n0);
    for (int64_t i = 0; i < p.m; ++i) {
        C* c = static_cast<C*>(p.c) + i * p.c_stride + n0;
        for (int64_t j = 0; j < columns; ++j) c[j] = static_cast<C>(sums[i * width + j]);
    }
}

template <class T, class C>
void Multiply(const Exec& ex, const Product& p) {
    const int64_t width = 2 * static_cast<int64_t>(hn::Lanes(DF()));
    const int64_t row_blocks = (p.m + kRows - 1) / kRows, panels = (p.n + width - 1) / width;
    const int64_t padded_m = row_blocks * kRows;
    const Scratch<float> a(ex, static_cast<size_t>(padded_m * kDepth));
    const Scratch<float> b(ex, static_cast<size_t>(panels * width * kDepth));
    const Scratch<float> c(ex, static_cast<size_t>(padded_m * panels * width));
    parallel_for(ex, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            LoadPanel<C>(p, j * width, width, c.data() + j * padded_m * width);
        }
    });
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, p.k - k0);
        parallel_for(ex, row_blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                PackA<T>(p, k0, depth, i * kRows, a.data() + i * kRows * kDepth);
            }
        });
        parallel_for(ex, panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) {
                float* panel = b.data() + j * width * kDepth;
                PackB<T>(p, k0, depth, j * width, width, panel);
                for (int64_t i = 0; i < row_blocks; ++i) {
                    Block(depth, a.data() + i * kRows * kDepth, panel,
                          c.data() + (j * padded_m + i * kRows) * width);
                }
            }
        });
    }
    parallel_for(ex, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            StorePanel<C>(p, j * width, width, c.data() + j * padded_m * width);
        }
    });
}

void ProductAny(const Exec& ex, const Product& p) {
    dispatch_activation(p.a.dtype, "linear", [&]<class T>() {
        dispatch_activation(p.c_dtype, "linear", [&]<class C>() { Multiply<T, C>(ex, p); });
    });
}

}  // namespace ssm::linear_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm::linear_detail {

HWY_EXPORT(ProductAny);

void product_plain(const Exec& ex, const Product& p) { HWY_DYNAMIC_DISPATCH(ProductAny)(ex, p); }

}  // namespace ssm::linear_detail
#endif
