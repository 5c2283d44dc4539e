// CUDA kernels of the elementwise functions: a thread per pack of 16 bytes, or per element where a view
// cannot be read so. Dense matrices are one row.
#include <array>
#include <type_traits>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/elementwise/elementwise_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "elementwise";
constexpr int kThreads = 256;

// y = f(a, b, y) with `a` and `b` where F reads them; Y is A's type or another.
template <class A, class Y, class F>
struct Params {
    View<const A, 2> a;
    View<const float, 2> b;
    View<Y, 2> y;
    int64_t rows, width;  // of the views, or 1 and their size
    F f;
};

template <int N, class A, class Y, class F>
__global__ void __launch_bounds__(kThreads) Map(const __grid_constant__ Params<A, Y, F> p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = p.width / N;
    const int64_t row = p.rows == 1 ? 0 : i / packs, column = (i - row * packs) * N;
    if (row >= p.rows || column >= p.width) return;
    const Pack<A, N> a = load_pack<N>(p.a.data + row * p.a.stride + column);
    Pack<float, N> b;
    Pack<Y, N> y;
    if constexpr (F::kReadsB) b = load_pack<N>(p.b.data + row * p.b.stride + column);
    if constexpr (F::kReadsY) y = load_pack<N>(p.y.data + row * p.y.stride + column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if constexpr (F::kReadsY) {
            y.at[k] = p.f(a.at[k], F::kReadsB ? b.at[k] : 0.0f, y.at[k]);
        } else if constexpr (F::kReadsB) {
            y.at[k] = p.f(a.at[k], b.at[k]);
        } else {
            y.at[k] = p.f(a.at[k]);
        }
    }
    store_pack(p.y.data + row * p.y.stride + column, y);
}

struct Reads1 {
    static constexpr bool kReadsB = false, kReadsY = false;
};
struct Reads2 {
    static constexpr bool kReadsB = true, kReadsY = false;
};

struct NegExp : Reads1 {
    __device__ float operator()(float x) const { return -expf(x); }
};
struct Silu : Reads1 {
    __device__ float operator()(float x) const { return x / (1.0f + expf(-x)); }
};
struct Softplus : Reads1 {
    __device__ float operator()(float x) const { return x > 20.0f ? x : log1pf(expf(x)); }
};
template <class Y>
struct Cast : Reads1 {
    template <class X>
    __device__ Y operator()(X x) const {
        if constexpr (std::is_same_v<X, Y>) return x;
        return from_float<Y>(to_float(x));
    }
};
struct Add : Reads2 {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Multiply : Reads2 {
    __device__ float operator()(float a, float b) const { return a * b; }
};
struct AddScaled {
    static constexpr bool kReadsB = false, kReadsY = true;
    float scale;
    template <class X, class Y>
    __device__ Y operator()(X x, float, Y y) const {
        return from_float<Y>(fmaf(to_float(x), scale, to_float(y)));
    }
};
// y += b f'(a)
struct AddSlope {
    static constexpr bool kReadsB = true, kReadsY = true;
};
struct AddProduct : AddSlope {
    __device__ float operator()(float a, float b, float y) const { return fmaf(a, b, y); }
};
struct AddSiluSlope : AddSlope {
    __device__ float operator()(float x, float grad, float y) const {
        return fmaf(silu_slope(x, 1.0f / (1.0f + expf(-x))), grad, y);
    }
};
struct AddSoftplusSlope : AddSlope {
    __device__ float operator()(float x, float grad, float y) const {
        return fmaf(1.0f / (1.0f + expf(-x)), grad, y);
    }
};

template <class A, class Y, class F>
void map(const Exec& ex, View<const A, 2> a, View<const float, 2> b, View<Y, 2> y, F f) {
    if (y.size() == 0) return;
    constexpr int N = 16 / static_cast<int>(sizeof(A) > sizeof(Y) ? sizeof(A) : sizeof(Y));
    const bool dense = a.dense() && y.dense() && (!F::kReadsB || b.dense());
    const Params<A, Y, F> p{a, b, y, dense ? 1 : y.shape[0], dense ? y.size() : y.shape[1], f};
    const auto aligned = [&](const auto& v) { return packable(v.data, dense ? 0 : v.stride, N); };
    const bool packs = p.width % N == 0 && aligned(a) && aligned(y) && (!F::kReadsB || aligned(b));
    const int64_t work = p.rows * p.width / (packs ? N : 1);
    if (packs) {
        Map<N><<<blocks_for(work, kThreads), kThreads, 0, stream_of(ex)>>>(p);
    } else {
        Map<1><<<blocks_for(work, kThreads), kThreads, 0, stream_of(ex)>>>(p);
    }
    check_launch(kOp);
}

}  // namespace

void unary(const Exec& ex, Unary f, View<const float, 2> x, View<float, 2> y) {
    switch (f) {
        case Unary::neg_exp: return map(ex, x, {}, y, NegExp{});
        case Unary::silu: return map(ex, x, {}, y, Silu{});
        case Unary::softplus: return map(ex, x, {}, y, Softplus{});
    }
}

void unary_backward(const Exec& ex, Unary f, View<const float, 2> x_or_y, View<const float, 2> grad_y,
                    View<float, 2> grad_x) {
    switch (f) {
        case Unary::neg_exp: return map(ex, x_or_y, grad_y, grad_x, AddProduct{});
        case Unary::silu: return map(ex, x_or_y, grad_y, grad_x, AddSiluSlope{});
        case Unary::softplus: return map(ex, x_or_y, grad_y, grad_x, AddSoftplusSlope{});
    }
}

void binary(const Exec& ex, Binary f, View<const float, 2> a, View<const float, 2> b, View<float, 2> y) {
    switch (f) {
        case Binary::add: return map(ex, a, b, y, Add{});
        case Binary::multiply: return map(ex, a, b, y, Multiply{});
    }
}

void accumulate_product(const Exec& ex, View<const float, 2> x, View<const float, 2> b, View<float, 2> y) {
    map(ex, x, b, y, AddProduct{});
}

template <class X, class Y>
void accumulate(const Exec& ex, View<const X, 2> x, View<Y, 2> y, float scale) {
    map(ex, x, {}, y, AddScaled{scale});
}
template void accumulate(const Exec&, View<const float, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const float, 2>, View<bf16, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<float, 2>, float);
template void accumulate(const Exec&, View<const bf16, 2>, View<bf16, 2>, float);

template <class X, class Y>
void cast(const Exec& ex, View<const X, 2> x, View<Y, 2> y) {
    map(ex, x, {}, y, Cast<Y>{});
}
template void cast(const Exec&, View<const float, 2>, View<float, 2>);
template void cast(const Exec&, View<const float, 2>, View<bf16, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<float, 2>);
template void cast(const Exec&, View<const bf16, 2>, View<bf16, 2>);

}  // namespace ssm::cuda
