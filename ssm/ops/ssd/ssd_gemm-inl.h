// Small matrix products in f32 for operands in L1 and L2: register tiles of kTileRows x kTileVectors.
// oneDNN's cost per call is as large as these products. Included once per instruction set. Private.
//
//   out[i, :] = beta_i out[i, :] + sum_k A(i, k) panel[k, :],      A(i, k) = a[i a_row + k a_k]
//
// Rows of `panel` and `out` are padded to whole vectors: columns up to the next multiple of Lanes are read
// and written. A may be read transposed (a_row = 1): its elements are broadcast one by one.
//
// The elements of A and panel are f32, or pairs of bf16 (PairProduct): one 32-bit word holds A(i, 2k) in its
// lower half and A(i, 2k+1) in its upper half, a word of `panel` two elements of one column; `depth`, a_k and
// the strides count words. Sums are f32 in both.
//
// Triangles are skipped in steps of one tile of rows, so the other triangle must be zero inside the tiles on
// the diagonal: up to tile_end(i, rows) in row i.
#if defined(SSM_OPS_SSD_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SSM_OPS_SSD_GEMM_INL_H_
#undef SSM_OPS_SSD_GEMM_INL_H_
#else
#define SSM_OPS_SSD_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 24 accumulators of 32 registers, or 12 of 16: enough chains to hide the latency of a multiply-add, few
// enough loads per multiply-add. Never more than 16 lanes.
inline constexpr int64_t kTileRows = 6;
inline constexpr int kTileVectors = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 4 : 2;
using FloatTag = hn::CappedTag<float, 16>;
using FloatVec = hn::Vec<FloatTag>;
using PairTag = hn::RebindToUnsigned<FloatTag>;
using PairVec = hn::Vec<PairTag>;

// Whether this instruction set's code can multiply pairs; the processor must be asked too (ssd_pairs-inl.h).
// Highway 1.0.3 has no such operation, and its AVX-512 target does not include the extension.
#undef SSM_SSD_PAIRS
#if HWY_ARCH_X86_64 && HWY_TARGET <= HWY_AVX3 && defined(__GNUC__)
#define SSM_SSD_PAIRS 1
#else
#define SSM_SSD_PAIRS 0
#endif

HWY_INLINE FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec sum) { return hn::MulAdd(a, b, sum); }
#if SSM_SSD_PAIRS
HWY_INLINE FloatVec multiply_add(PairVec a, PairVec b, FloatVec sum) {
    __m512 out = sum.raw;
    asm("vdpbf16ps %2, %1, %0" : "+v"(out) : "v"(a.raw), "v"(b.raw));
    return FloatVec{out};
}
#endif

// The end of the tile of rows that row i lies in.
HWY_INLINE int64_t tile_end(int64_t i, int64_t rows) {
    return std::min(rows, (i / kTileRows + 1) * kTileRows);
}

enum class Triangle {
    none,
    lower,      // A is lower triangular: k <= i
    upper,      // A is upper triangular: k >= i
    out_lower,  // only the lower triangle of `out` is wanted
};

template <class E>
struct ProductOf {
    const E* a;
    int64_t a_row, a_k;
    const E* panel;
    int64_t panel_stride;
    float* out;
    int64_t out_stride;
    int64_t rows, columns, depth;
    const float* beta = nullptr;  // absent: `out` is not read
    int64_t beta_stride = 0;      // 1: one beta per row
};
using Product = ProductOf<float>;
using PairProduct = ProductOf<uint32_t>;

template <int kRows, int kVectors, class E>
HWY_INLINE void multiply_tile(const ProductOf<E>& s, int64_t row, int64_t column, int64_t k_begin,
                              int64_t k_end) {
    const FloatTag d;
    const hn::Rebind<E, FloatTag> de;
    using V = FloatVec;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    V sum[kRows][kVectors];
    float* out = s.out + row * s.out_stride + column;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = s.beta == nullptr ? hn::Zero(d)
                                          : hn::Mul(hn::Set(d, s.beta[(row + r) * s.beta_stride]),
                                                    hn::LoadU(d, out + r * s.out_stride + v * lanes));
        }
    }
    const E* a = s.a + row * s.a_row + k_begin * s.a_k;
    const E* panel = s.panel + k_begin * s.panel_stride + column;
    for (int64_t k = k_begin; k < k_end; ++k) {
        hn::Vec<decltype(de)> p[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) p[v] = hn::LoadU(de, panel + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const auto factor = hn::Set(de, a[r * s.a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(factor, p[v], sum[r][v]);
        }
        a += s.a_k;
        panel += s.panel_stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], d, out + r * s.out_stride + v * lanes);
    }
}

template <int kVectors, class E>
HWY_NOINLINE void multiply_columns(const ProductOf<E>& s, Triangle triangle, int64_t column) {
    constexpr int64_t kPerWord = std::is_same_v<E, float> ? 1 : 2;
    int64_t i = triangle == Triangle::out_lower ? column / kTileRows * kTileRows : 0;
    for (; i < s.rows; i += kTileRows) {
        const int64_t rows = std::min(kTileRows, s.rows - i);
        const int64_t k_begin = triangle == Triangle::upper ? i / kPerWord : 0;
        const int64_t k_end =
            triangle == Triangle::lower ? std::min(s.depth, (i + rows + kPerWord - 1) / kPerWord) : s.depth;
        switch (rows) {
            case 1: multiply_tile<1, kVectors>(s, i, column, k_begin, k_end); break;
            case 2: multiply_tile<2, kVectors>(s, i, column, k_begin, k_end); break;
            case 3: multiply_tile<3, kVectors>(s, i, column, k_begin, k_end); break;
            case 4: multiply_tile<4, kVectors>(s, i, column, k_begin, k_end); break;
            case 5: multiply_tile<5, kVectors>(s, i, column, k_begin, k_end); break;
            default: multiply_tile<6, kVectors>(s, i, column, k_begin, k_end); break;
        }
    }
}

template <class E>
HWY_INLINE void multiply_any(const ProductOf<E>& s, Triangle triangle) {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(FloatTag()));
    int64_t column = 0;
    const auto vectors_left = [&] { return (s.columns - column + lanes - 1) / lanes; };
    for (; vectors_left() >= kTileVectors; column += kTileVectors * lanes) {
        multiply_columns<kTileVectors>(s, triangle, column);
    }
    switch (vectors_left()) {
        case 3: multiply_columns<3>(s, triangle, column); break;
        case 2: multiply_columns<2>(s, triangle, column); break;
        case 1: multiply_columns<1>(s, triangle, column); break;
        default: break;
    }
}

HWY_INLINE void multiply(const Product& s, Triangle triangle = Triangle::none) { multiply_any(s, triangle); }
#if SSM_SSD_PAIRS
HWY_INLINE void multiply_pairs(const PairProduct& s, Triangle triangle = Triangle::none) {
    multiply_any(s, triangle);
}
#endif

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include-once per target
