// Tiles of the CUDA kernels of ssd: 64 tokens of one head in shared memory, products of 16 x 16 x 16 blocks
// by the tensor cores. bf16 multiplies as it is; f32 by three tf32 products of a high and a low part, whose
// error is 2^-20 of an operand. Private.
#pragma once

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/sequences.cuh"
#include "ssm/ops/ssd/ssd_impl.h"

namespace ssm::cuda {

constexpr int kQ = 64;   // tokens of a tile
constexpr int kP = 64;   // elements of a head in a tile; a wider head is several tiles
constexpr int kPad = 8;  // behind each row in shared memory: no two rows of a fragment in one bank
constexpr int kMaxN = 128;

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

__device__ inline void multiply_tf32(float* sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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
            multiply_tf32(s.v + 4 * tile, xl, yh);
            multiply_tf32(s.v + 4 * tile, xh, yl);
            multiply_tf32(s.v + 4 * tile, xh, yh);
        }
    }
}
__device__ inline void multiply(Sum& s, const Left<bf16>& a, const Right<bf16>& b) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        float* sum = s.v + 4 * tile;
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[2 * tile]), "r"(b.v[2 * tile + 1]));
    }
}

// Where element e of a Sum lies in its block.
__device__ inline int row_of(int e) { return static_cast<int>(threadIdx.x % kWarp / 4) + e / 2 % 2 * 8; }
__device__ inline int column_of(int e) { return static_cast<int>(threadIdx.x % 4 * 2) + e % 2 + e / 4 * 8; }

// Sums to shared memory: block `s` at m, rows of ld.
template <class E>
__device__ inline void store(E* m, int ld, const Sum& s) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const Pack<E, 2> v{{from_float<E>(s.v[e]), from_float<E>(s.v[e + 1])}};
        store_pack(m + row_of(e) * ld + column_of(e), v);
    }
}

// ---- tiles
// kRows x kColumns from rows `stride` apart, rounded to E; zero from `rows` and `columns` on. `packed`: rows
// are aligned to 16 bytes and `columns` is a multiple of what 16 bytes hold.
template <int kRows, int kColumns, int kThreads, class E, class T>
__device__ inline void load_tile(E* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    constexpr int kLd = kColumns + kPad, kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
    if (packed) {
#pragma unroll 4
        for (int i = threadIdx.x; i < kRows * kPacks; i += kThreads) {
            const int row = i / kPacks, column = i % kPacks * kPack;
            Pack<T, kPack> v = {};
            if (row < rows && column < columns) v = load_pack<kPack>(from + row * stride + column);
            if constexpr (sizeof(T) == sizeof(E)) {
                store_pack(to + row * kLd + column, v);
            } else {
                Pack<E, kPack> rounded;
#pragma unroll
                for (int k = 0; k < kPack; ++k) rounded.at[k] = from_float<E>(to_float(v.at[k]));
                store_pack(to + row * kLd + column, rounded);
            }
        }
    } else {
        for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            const bool inside = row < rows && column < columns;
            to[row * kLd + column] = from_float<E>(inside ? to_float(from[row * stride + column]) : 0.0f);
        }
    }
}

// The same without waiting: by asynchronous copies where rows are packed; wait_copies() and a barrier before
// use.
template <int kRows, int kColumns, int kThreads, class T>
__device__ inline void copy_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    if (!packed) return load_tile<kRows, kColumns, kThreads>(to, from, stride, rows, columns, false);
    constexpr int kLd = kColumns + kPad, kPack = 16 / sizeof(T), kPacks = kColumns / kPack;
    static_assert(kRows * kPacks % kThreads == 0);
#pragma unroll
    for (int k = 0; k < kRows * kPacks / kThreads; ++k) {
        const int i = static_cast<int>(threadIdx.x) + k * kThreads, row = i / kPacks,
                  column = i % kPacks * kPack;
        const bool inside = row < rows && column < columns;
        const T* source = inside ? from + row * stride + column : from;
        const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to + row * kLd + column));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                     "r"(inside ? 16 : 0)
                     : "memory");
    }
}
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Time steps of a tile's tokens; those from `length` on have dt 0 and the last decay sum.
struct Decays {
    float dt[kQ], l[kQ];  // l: sums of dt A up to and with this token
};

template <class T>
__device__ inline float raw_dt(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return to_float(in.dt.data[t * in.dt.stride + h]) +
           (in.dt_bias.data != nullptr ? in.dt_bias.data[h * in.dt_bias.stride] : 0.0f);
}
__device__ inline float exact_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
template <class T>
__device__ inline float step_of_raw(const SsdInputs<T>& in, float raw) {
    return in.dt_softplus ? fminf(fmaxf(exact_softplus(raw), in.dt_min), in.dt_max) : raw;
}
template <class T>
__device__ inline float step_size(const SsdInputs<T>& in, int64_t t, int64_t h) {
    return step_of_raw(in, raw_dt(in, t, h));
}

// A lane's two raw time steps of a tile; by one warp, as are those below.
template <class T>
__device__ inline float2 raw_pair(const SsdInputs<T>& in, int64_t begin, int length, int64_t h) {
    const int i = 2 * (threadIdx.x % kWarp);
    return {i < length ? raw_dt(in, begin + i, h) : 0.0f,
            i + 1 < length ? raw_dt(in, begin + i + 1, h) : 0.0f};
}
template <class T>
__device__ inline void make_decays(Decays& d, const SsdInputs<T>& in, float2 raw, int length, int64_t h) {
    const int lane = threadIdx.x % kWarp, i = 2 * lane;
    const float dt0 = i < length ? step_of_raw(in, raw.x) : 0.0f;
    const float dt1 = i + 1 < length ? step_of_raw(in, raw.y) : 0.0f;
    const double A = in.A.data[h * in.A.stride], a0 = dt0 * A, a1 = dt1 * A;
    double sum = a0 + a1;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += other;
    }
    d.dt[i] = dt0;
    d.dt[i + 1] = dt1;
    d.l[i] = static_cast<float>(sum - a1);
    d.l[i + 1] = static_cast<float>(sum);
}

template <class T>
__device__ inline void make_decays(Decays& d, const SsdInputs<T>& in, int64_t begin, int length, int64_t h) {
    make_decays(d, in, raw_pair(in, begin, length, h), length, h);
}

// D of a tile's elements, 0 where it is absent; by kP threads.
__device__ inline void load_D(float* to, const View<const float, 2>& D, int64_t h, int64_t p0, int columns) {
    const int j = threadIdx.x % kP;
    const bool given = D.data != nullptr && j < columns;
    to[j] = given ? D.data[h * D.stride + (D.shape[1] == 1 ? 0 : p0 + j)] : 0.0f;
}

// ---- host
// Whether rows of [t a b] can be loaded in packs of 16 bytes.
template <class T, size_t R>
bool packed16(const T* data, int64_t stride, const std::array<int64_t, R>& shape) {
    const int64_t n = 16 / static_cast<int64_t>(sizeof(T));
    return packable(data, stride, n) && shape[R - 1] % n == 0;
}

inline std::vector<int64_t> first_chunks(CuSeqlens cu_seqlens, int64_t chunk) {
    std::vector<int64_t> first{0};
    for (size_t s = 1; s < cu_seqlens.size(); ++s)
        first.push_back(first.back() + (cu_seqlens[s] - cu_seqlens[s - 1] + chunk - 1) / chunk);
    return first;
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Dynamic shared memory beyond 48 KB has to be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, std::string_view op) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          op);
}

inline void require_state_width(std::string_view op, int64_t n) {
    if (n > kMaxN) fail(ErrorCode::unsupported, op, "on CUDA n may be at most {} but is {}", kMaxN, n);
}

}  // namespace ssm::cuda
