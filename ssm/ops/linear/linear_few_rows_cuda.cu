// y = x W^T + bias for few rows of x on a GPU: W is streamed once. A group of lanes computes some
// neighbouring rows of W with every row of x; lanes read 16 bytes of a row of W each, past the L1 cache, in
// which x stays. The sums are reduced over the group by halving what each lane holds, in a fixed order.
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/core/cuda/warp_sums.cuh"
#include "ssm/ops/linear/linear_impl.h"

namespace ssm::cuda {
namespace {

using linear_detail::FewRows;

constexpr int kMostThreads = 256;
constexpr int64_t kManyRows = 128;  // of W on a multiprocessor

struct Params {
    int64_t i, o;
    int t;
    const void *x, *weight;
    int64_t x_stride, weight_stride;
    const float* bias;
    void* y;
    int64_t y_stride;
    bool y_is_bf16;
};

// A pack of the weight, read once.
template <int N, class T>
__device__ inline Pack<T, N> load_once(const T* p) {
    if constexpr (sizeof(Pack<T, N>) == 16) {
        union {
            uint32_t words[4];
            Pack<T, N> pack;
        } u;
        asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
            : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
            : "l"(p));
        return u.pack;
    } else {
        return load_pack<N>(p);
    }
}

// N elements of x as the product sees them: rounded to bf16 when the weight is.
template <class W, int N, class X>
__device__ inline void load_x(const X* p, float (&x)[N]) {
    constexpr int kPart = sizeof(X) == 4 && N > 4 ? 4 : N;
#pragma unroll
    for (int j = 0; j < N; j += kPart) {
        const Pack<X, kPart> part = load_pack<kPart>(p + j);
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
            x[j + k] = to_float(part.at[k]);
            if constexpr (sizeof(X) > sizeof(W)) x[j + k] = to_float(from_float<W>(x[j + k]));
        }
    }
}

__device__ inline void store_y(const Params& p, int t, int64_t row, float sum) {
    const float y = sum + (p.bias != nullptr ? p.bias[row] : 0.0f);
    if (p.y_is_bf16) {
        static_cast<bf16*>(p.y)[t * p.y_stride + row] = from_float<bf16>(y);
    } else {
        static_cast<float*>(p.y)[t * p.y_stride + row] = y;
    }
}

// T: rows of x (a power of two, p.t of them real). R: rows of W of a group of G lanes. N: elements of a load.
// U: loads of a row that are begun before the first is used.
template <class X, class W, int T, int R, int G, int N, int U>
__global__ void __launch_bounds__(kMostThreads) Stream(const __grid_constant__ Params p) {
    const int64_t group = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / G;
    const int lane = threadIdx.x % G;
    const int64_t first = group * R;
    const W* rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int64_t row =
            first + r < p.o ? first + r : p.o - 1;  // what is too much is computed, not stored
        rows[r] = static_cast<const W*>(p.weight) + row * p.weight_stride;
    }
    const X* x_rows[T];
#pragma unroll
    for (int t = 0; t < T; ++t) x_rows[t] = static_cast<const X*>(p.x) + (t < p.t ? t : 0) * p.x_stride;
    float sums[R * T] = {};
    for (int64_t base = lane * N; base < p.i; base += int64_t{G} * N * U) {
        Pack<W, N> w[U][R];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int64_t j = base + u * G * N;
#pragma unroll
            for (int r = 0; r < R; ++r)
                if (j < p.i) w[u][r] = load_once<N>(rows[r] + j);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int64_t j = base + u * G * N;
            if (j >= p.i) break;
#pragma unroll
            for (int t = 0; t < T; ++t) {
                float x[N];
                load_x<W, N>(x_rows[t] + j, x);
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int k = 0; k < N; ++k)
                        sums[r * T + t] = fmaf(to_float(w[u][r].at[k]), x[k], sums[r * T + t]);
                }
            }
        }
    }
    constexpr int kEach = G / (R * T);
    const float sum = sum_values<R * T, G>(sums);
    const int t = lane / kEach % T;
    const int64_t row = first + lane / kEach / T;
    if (lane % kEach != 0 || t >= p.t || row >= p.o) return;
    store_y(p, t, row, sum);
}

// ---- Launching ----

template <class X, class W, int T, int R, int G, int N, int U>
void launch(const Exec& ex, const Params& p) {
    const int64_t lanes = (p.o + R - 1) / R * G;
    // Few rows: small blocks, so that they reach every multiprocessor.
    const int64_t each = lanes / ex.cuda->multiprocessors() / kWarp * kWarp;
    const int threads = static_cast<int>(each < kWarp ? kWarp : each > kMostThreads ? kMostThreads : each);
    Stream<X, W, T, R, G, N, U><<<blocks_for(lanes, threads), threads, 0, stream_of(ex)>>>(p);
    check_launch("linear");
}

template <class X, class W, int T>
void choose_shape(const Exec& ex, const Params& p, bool packs) {
    constexpr int kPack = 16 / static_cast<int>(sizeof(W));
    // With more rows of W on a multiprocessor each lane takes several, so that x is read less often.
    constexpr int64_t kSome = 32;
    if (!packs) return launch<X, W, T, 1, kWarp, 1, 4>(ex, p);
    if (p.i <= 16 * kPack) return launch<X, W, T, 1, 8, kPack, 2>(ex, p);
    const int64_t each = p.o / ex.cuda->multiprocessors();
    if (each >= (T == 8 ? kSome / 2 : kManyRows)) return launch<X, W, T, 4, kWarp, kPack, 2>(ex, p);
    if (each >= (T >= 4 ? kSome / 4 : kSome)) return launch<X, W, T, 2, kWarp, kPack, 2>(ex, p);
    launch<X, W, T, 1, kWarp, kPack, T <= 2 && sizeof(W) == 2 ? 8 : 4>(ex, p);
}

template <class X, class W>
void choose_rows(const Exec& ex, const Params& p) {
    constexpr int64_t kPack = 16 / static_cast<int64_t>(sizeof(W));
    constexpr int64_t kPackX = kPack * static_cast<int64_t>(sizeof(X)) > 16 ? 4 : kPack;
    const bool packs = p.i % kPack == 0 &&
                       packable(static_cast<const W*>(p.weight), p.weight_stride, kPack) &&
                       packable(static_cast<const X*>(p.x), p.x_stride, kPackX);
    if (p.t <= 1) return choose_shape<X, W, 1>(ex, p, packs);
    if (p.t <= 2) return choose_shape<X, W, 2>(ex, p, packs);
    if constexpr (sizeof(W) == 4) {
        if (p.t > 4) return choose_shape<X, W, 8>(ex, p, packs);
    }
    choose_shape<X, W, 4>(ex, p, packs);
}

}  // namespace

void few_rows(const Exec& ex, const FewRows& args) {
    const Params p{.i = args.i,
                   .o = args.o,
                   .t = static_cast<int>(args.t),
                   .x = args.x.data,
                   .weight = args.weight.data,
                   .x_stride = args.x.stride,
                   .weight_stride = args.weight.stride,
                   .bias = args.bias,
                   .y = args.y,
                   .y_stride = args.y_stride,
                   .y_is_bf16 = args.y_dtype == DType::bf16};
    const bool x16 = args.x.dtype == DType::bf16, w16 = args.weight.dtype == DType::bf16;
    if (x16 && w16) return choose_rows<bf16, bf16>(ex, p);
    if (x16) return choose_rows<bf16, float>(ex, p);
    if (w16) return choose_rows<float, bf16>(ex, p);
    choose_rows<float, float>(ex, p);
}

}  // namespace ssm::cuda
