// Products of 16 x 16 x 16 blocks by the tensor cores, from shared memory: the fragments of the CUDA kernels
// of ssd. bf16 multiplies as it is; f32 by three tf32 products of a high and a low part, whose error is 2^-20
// of an operand. Private.
#pragma once

#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/products.cuh"

namespace ssm::cuda {

// ---- fragments. Lane 4 g + c holds of a left 16 x 16 block the elements (g, 2c), (g, 2c + 1), (g + 8, 2c),
// (g + 8, 2c + 1), then the same 8 columns on; of a right one (k x n) for n = g and n = g + 8 the four
// k = 2c, 2c + 1, 2c + 8, 2c + 9; of a result as of a left one.
template <class E>
struct Left;
template <class E>
struct Right;
template <>
struct Left<float> {
    float v[8];
};
template <>
struct Right<float> {
    float v[8];
};
template <>
struct Left<bf16> {
    uint32_t v[4];
};
template <>
struct Right<bf16> {
    uint32_t v[4];
};
struct Sum {
    float v[8] = {};
};

__device__ inline uint32_t pair_of(float a, float b) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// Four 8 x 8 blocks of bf16; the lanes 8 i .. 8 i + 7 give the rows of block i.
template <bool kTransposed>
__device__ inline void load_blocks(uint32_t (&v)[4], const bf16* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at));
    }
}

// The left block at row i, column k of a matrix; `kTransposed`: element (i, k) lies at m[k][i].
template <bool kTransposed>
__device__ inline Left<bf16> left(const bf16* m, int ld, int i, int k) {
    const int lane = threadIdx.x % kWarp, low = lane % 8, a = lane / 8 % 2 * 8, b = lane / 16 * 8;
    Left<bf16> f;
    load_blocks<kTransposed>(f.v,
                             kTransposed ? m + (k + low + b) * ld + i + a : m + (i + low + a) * ld + k + b);
    return f;
}
template <bool kTransposed>
__device__ inline Left<float> left(const float* m, int ld, int i, int k) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4 * 2;
    Left<float> f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int row = i + g + e / 2 % 2 * 8, column = k + c + e % 2 + e / 4 * 8;
        f.v[e] = kTransposed ? m[column * ld + row] : m[row * ld + column];
    }
    return f;
}

// The right block at row k, column n of a matrix whose element (k, n) lies at m[n][k]; `kTransposed`: at
// m[k][n].
template <bool kTransposed>
__device__ inline Right<bf16> right(const bf16* m, int ld, int k, int n) {
    const int lane = threadIdx.x % kWarp, low = lane % 8, a = lane / 8 % 2 * 8, b = lane / 16 * 8;
    Right<bf16> f;
    load_blocks<kTransposed>(f.v,
                             kTransposed ? m + (k + low + a) * ld + n + b : m + (n + low + b) * ld + k + a);
    return f;
}
template <bool kTransposed>
__device__ inline Right<float> right(const float* m, int ld, int k, int n) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4 * 2;
    Right<float> f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int row = k + c + e % 2 + e / 2 % 2 * 8, column = n + g + e / 4 * 8;
        f.v[e] = kTransposed ? m[row * ld + column] : m[column * ld + row];
    }
    return f;
}

// A result as the left operand of the next product.
template <class E>
__device__ inline Left<E> as_left(const Sum& s) {
    Left<E> f;
    if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int e = 0; e < 8; ++e) f.v[e] = s.v[e];
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) f.v[e] = pair_of(s.v[2 * e], s.v[2 * e + 1]);
    }
    return f;
}

// Element e of a left block: where it lies, row_of and column_of say.
__device__ inline float element(const Left<float>& f, int e) { return f.v[e]; }
__device__ inline float element(const Left<bf16>& f, int e) {
    return __uint_as_float(e % 2 == 0 ? f.v[e / 2] << 16 : f.v[e / 2] & 0xffff0000u);
}

// Column k of the left block times w[k]; w points at the block's 16 factors.
__device__ inline void scale_columns(Left<float>& f, const float* w) {
    const int c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int e = 0; e < 8; ++e) f.v[e] *= w[c + e % 2 + e / 4 * 8];
}
__device__ inline void scale_columns(Left<bf16>& f, const float* w) {
    const int c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float low = __uint_as_float(f.v[e] << 16), high = __uint_as_float(f.v[e] & 0xffff0000u);
        f.v[e] = pair_of(low * w[c + e / 2 * 8], high * w[c + 1 + e / 2 * 8]);
    }
}

// s += a b. The summed index may be taken in any order that both sides share: f32 takes 2c as c and 2c + 1 as
// c + 4 of the instruction's eight.
__device__ inline void multiply(Sum& s, const Left<float>& a, const Right<float>& b) {
    const auto high = [](float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; };
    const auto low = [&](float x) { return __float_as_uint(x - __uint_as_float(high(x))); };
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float x[4] = {a.v[4 * k], a.v[4 * k + 2], a.v[4 * k + 1], a.v[4 * k + 3]};
        const uint32_t xh[4] = {high(x[0]), high(x[1]), high(x[2]), high(x[3])};
        const uint32_t xl[4] = {low(x[0]), low(x[1]), low(x[2]), low(x[3])};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const float y0 = b.v[4 * tile + 2 * k], y1 = b.v[4 * tile + 2 * k + 1];
            const uint32_t yh[2] = {high(y0), high(y1)}, yl[2] = {low(y0), low(y1)};
            multiply_tf32(s.v + 4 * tile, xl[0], xl[1], xl[2], xl[3], yh[0], yh[1]);
            multiply_tf32(s.v + 4 * tile, xh[0], xh[1], xh[2], xh[3], yl[0], yl[1]);
            multiply_tf32(s.v + 4 * tile, xh[0], xh[1], xh[2], xh[3], yh[0], yh[1]);
        }
    }
}
__device__ inline void multiply(Sum& s, const Left<bf16>& a, const Right<bf16>& b) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        multiply_bf16(s.v + 4 * tile, a.v[0], a.v[1], a.v[2], a.v[3], b.v[2 * tile], b.v[2 * tile + 1]);
    }
}

// Where element e of a Sum lies in its block.
__device__ inline int row_of(int e) { return static_cast<int>(threadIdx.x % kWarp / 4) + e / 2 % 2 * 8; }
__device__ inline int column_of(int e) { return static_cast<int>(threadIdx.x % 4 * 2) + e % 2 + e / 4 * 8; }

// Four neighbours of a row of a Sum: pairs of lanes exchange, so that a row's 16 columns are four lanes'
// fours.
struct Four {
    float v[4];
};
__device__ inline int column_of_four() {
    const int c = threadIdx.x % 4;
    return 2 * c + (c % 2 == 0 ? 0 : 6);
}
// `below`: of the row eight further down. By all lanes of a warp.
template <bool below>
__device__ inline Four four_of(const Sum& s) {
    constexpr int r = below ? 2 : 0;
    const bool odd = threadIdx.x % 2 != 0;
    const float a = odd ? s.v[4 + r] : s.v[r], b = odd ? s.v[5 + r] : s.v[1 + r],
                c = __shfl_xor_sync(kAllLanes, odd ? s.v[r] : s.v[4 + r], 1),
                d = __shfl_xor_sync(kAllLanes, odd ? s.v[1 + r] : s.v[5 + r], 1);
    return odd ? Four{{c, d, a, b}} : Four{{a, b, c, d}};
}

// Sums to shared memory: block `s` at m, rows of ld.
template <class E>
__device__ inline void store(E* m, int ld, const Sum& s) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const Pack<E, 2> v{{from_float<E>(s.v[e]), from_float<E>(s.v[e + 1])}};
        store_pack(m + row_of(e) * ld + column_of(e), v);
    }
}

}  // namespace ssm::cuda
