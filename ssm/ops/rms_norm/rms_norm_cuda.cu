// CUDA kernels of rms_norm. A team of threads keeps its row (of one group) in registers from the sum of
// squares to the scaling, so memory is read and written once; the backward pass also keeps its columns' sums
// for grad_weight and leaves them once per block. Rows that packs of 16 bytes cannot read, and those too wide
// for registers, go through a plain loop.
#include <algorithm>
#include <type_traits>

#include "ssm/core/cuda/column_sums.cuh"
#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/rms_norm/rms_norm_impl.h"

namespace ssm::cuda {
namespace {

using Gate = RmsNormOptions::Gate;
constexpr std::string_view kOp = "rms_norm";
constexpr int kThreads = 256;

// Where the row of a group lies.
struct Place {
    int64_t row, group, first;  // first: the group's first column
};
__device__ inline Place place_of(int64_t i, int64_t groups, int64_t width) {
    if (groups == 1) return {i, 0, 0};
    return {i / groups, i % groups, i % groups * width};
}

// Sum over a team of consecutive threads, in all of them, in a fixed order. All of the block must call it.
template <int kTeam>
__device__ inline float team_sum(float x, float* scratch) {
    x = warp_sum(x);
    if constexpr (kTeam == kWarp) return x;
    constexpr int kWarps = kTeam / kWarp;
    __syncthreads();  // whoever still reads the last sum
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    const float* mine = scratch + threadIdx.x / kTeam * kWarps;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += mine[i];
    return sum;
}

template <int N>
__device__ inline Pack<float, N> load_weight(const View<const float, 1>& weight, bool unit_offset,
                                             int64_t column) {
    Pack<float, N> w;
    if (weight.data != nullptr) w = load_pack<N>(weight.data + column);
#pragma unroll
    for (int k = 0; k < N; ++k)
        w.at[k] = weight.data == nullptr ? 1.0f : w.at[k] + (unit_offset ? 1.0f : 0.0f);
    return w;
}

// A thread's part of a row as it lies in memory.
template <class X, class Y, bool kAdd, bool kGated, int N, int kValues, int kTeam>
struct ForwardRow {
    static constexpr int kPacks = kValues / N;
    Pack<X, N> x[kPacks];
    Pack<float, N> residual[kAdd ? kPacks : 1];
    Pack<Y, N> z[kGated ? kPacks : 1];

    __device__ static int64_t column(int n) {
        return (n * kTeam + static_cast<int>(threadIdx.x) % kTeam) * N;
    }
    __device__ void load(const RmsNormCall<X, Y>& p, int64_t row, int64_t first, int64_t width) {
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            const int64_t j = first + column(n);
            if (column(n) >= width) continue;
            x[n] = load_pack<N>(p.in.x.data + row * p.in.x.stride + j);
            if constexpr (kAdd) residual[n] = load_pack<N>(p.residual.data + row * p.residual.stride + j);
            if constexpr (kGated) z[n] = load_pack<N>(p.in.z.data + row * p.in.z.stride + j);
        }
    }
    // v, and silu(z) where the gate comes after.
    __device__ void unpack(Gate gate, int64_t width, Pack<float, N>* v, Pack<float, N>* open) const {
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            v[n] = {};
            if (column(n) >= width) continue;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                float value = to_float(x[n].at[k]);
                if constexpr (kAdd) value += residual[n].at[k];
                if constexpr (kGated) {
                    const float s = silu(to_float(z[n].at[k]));
                    open[n].at[k] = gate == Gate::after ? s : 1.0f;
                    value *= gate == Gate::before ? s : 1.0f;
                }
                v[n].at[k] = value;
            }
        }
    }
};

// kAdd: v = residual + x. N: elements of a pack, kValues: elements in a thread's registers. A team takes rows
// of one group (blockIdx.y) with the weights in registers, and reads the next row before it is done with this
// one.
template <class X, class Y, bool kAdd, bool kGated, int N, int kValues, int kTeam>
__global__ void __launch_bounds__(kThreads, 2) Forward(const __grid_constant__ RmsNormCall<X, Y> p) {
    using Row = ForwardRow<X, Y, kAdd, kGated, N, kValues, kTeam>;
    constexpr int kPacks = kValues / N, kTeams = kThreads / kTeam;
    __shared__ float scratch[kThreads / kWarp];
    const int64_t t = p.in.x.shape[0], width = p.in.x.shape[1] / p.options.groups;
    const int64_t first = blockIdx.y * width, stride = static_cast<int64_t>(gridDim.x) * kTeams;
    const int64_t team = threadIdx.x / kTeam;
    int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + team;
    Row next;
    if (row < t) next.load(p, row, first, width);
    Pack<float, N> w[kPacks], v[kPacks], open[kGated ? kPacks : 1];
#pragma unroll
    for (int n = 0; n < kPacks; ++n)
        if (Row::column(n) < width)
            w[n] = load_weight<N>(p.in.weight, p.options.unit_offset, first + Row::column(n));
    // All teams of a block go round equally often: they share its barriers.
    for (; row - team < t; row += stride) {
        next.unpack(p.options.gate, width, v, open);
        if (row + stride < t) next.load(p, row + stride, first, width);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kPacks; ++n)
#pragma unroll
            for (int k = 0; k < N; ++k) sum += v[n].at[k] * v[n].at[k];
        const float rstd = rsqrtf(team_sum<kTeam>(sum, scratch) / static_cast<float>(width) + p.options.eps);
        if (row >= t) continue;
        if (p.rstd.data != nullptr && threadIdx.x % kTeam == 0)
            p.rstd.data[row * p.rstd.stride + blockIdx.y] = rstd;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            const int64_t j = first + Row::column(n);
            if (Row::column(n) >= width) continue;
            if constexpr (kAdd) store_pack(p.residual_out.data + row * p.residual_out.stride + j, v[n]);
            Pack<Y, N> out;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float scale = rstd * w[n].at[k];
                out.at[k] = from_float<Y>(v[n].at[k] * (kGated ? scale * open[kGated ? n : 0].at[k] : scale));
            }
            store_pack(p.y.data + row * p.y.stride + j, out);
        }
    }
}

// Any width and alignment: a block per row.
template <class X, class Y>
__global__ void __launch_bounds__(kThreads) ForwardPlain(const __grid_constant__ RmsNormCall<X, Y> p) {
    __shared__ float scratch[kThreads / kWarp];
    const int64_t groups = p.options.groups, width = p.in.x.shape[1] / groups;
    const Place at = place_of(blockIdx.x, groups, width);
    const X* x = p.in.x.data + at.row * p.in.x.stride + at.first;
    const Y* z = p.in.z.data + at.row * p.in.z.stride + at.first;
    const float* residual = p.residual.data + at.row * p.residual.stride + at.first;
    float* residual_out = p.residual_out.data + at.row * p.residual_out.stride + at.first;
    const bool add = p.residual.data != nullptr;
    float sum = 0;
    for (int64_t j = threadIdx.x; j < width; j += kThreads) {
        float v = to_float(x[j]);
        if (add) residual_out[j] = v += residual[j];
        if (p.options.gate == Gate::before) v *= silu(to_float(z[j]));
        sum += v * v;
    }
    const float rstd = rsqrtf(block_sum(sum, scratch) / static_cast<float>(width) + p.options.eps);
    if (p.rstd.data != nullptr && threadIdx.x == 0) p.rstd.data[at.row * p.rstd.stride + at.group] = rstd;
    Y* y = p.y.data + at.row * p.y.stride + at.first;
    for (int64_t j = threadIdx.x; j < width; j += kThreads) {
        float v = (add ? residual_out[j] : to_float(x[j])) * rstd;
        v *= load_weight<1>(p.in.weight, p.options.unit_offset, at.first + j).at[0];
        if (p.options.gate != Gate::none) v *= silu(to_float(z[j]));
        y[j] = from_float<Y>(v);
    }
}

template <class X, class Y>
struct BackwardParams {
    RmsNormBackwardCall<X, Y> call;
    float* partial;  // [chunks d], or null
    int64_t chunk;   // rows of a block
};

// The gradients of one element, in two parts: what the row's sum needs, then what it gives.
struct Element {
    float g, normed, gated, gate, slope;  // grad_y w (silu z), v^, what grad_weight gets, silu(z), silu'(z)
};
template <bool kGated>
__device__ inline Element element_of(float x, float z, float grad_y, float w, float rstd, Gate gate) {
    if constexpr (!kGated) return {grad_y * w, x * rstd, grad_y * x * rstd, 1.0f, 0.0f};
    const float s = sigmoid(z), open = z * s;
    const float normed = x * rstd * (gate == Gate::before ? open : 1.0f);
    const float outer = grad_y * (gate == Gate::after ? open : 1.0f);
    return {outer * w, normed, outer * normed, open, silu_slope(z, s)};
}
struct Slopes {
    float x, z;
};
template <bool kGated>
__device__ inline Slopes slopes_of(const Element& e, float x, float grad_y, float w, float rstd, float mean,
                                   Gate gate) {
    const float grad_v = rstd * (e.g - e.normed * mean);
    if constexpr (!kGated) return {grad_v, 0.0f};
    if (gate == Gate::before) return {grad_v * e.gate, grad_v * x * e.slope};
    return {grad_v, grad_y * w * e.normed * e.slope};
}

template <class X, class Y, bool kGated, int N, int kValues, int kTeam>
struct BackwardRow {
    static constexpr int kPacks = kValues / N;
    Pack<X, N> x[kPacks];
    Pack<Y, N> z[kGated ? kPacks : 1];
    Pack<float, N> grad_y[kPacks];

    __device__ void load(const RmsNormBackwardCall<X, Y>& c, const Place& at, int64_t width) {
        const int lane = threadIdx.x % kTeam;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            const int64_t j = (n * kTeam + lane) * N;
            if (j >= width) continue;
            x[n] = load_pack<N>(c.in.x.data + at.row * c.in.x.stride + at.first + j);
            grad_y[n] = load_pack<N>(c.grad_y.data + at.row * c.grad_y.stride + at.first + j);
            if constexpr (kGated) z[n] = load_pack<N>(c.in.z.data + at.row * c.in.z.stride + at.first + j);
        }
    }
    __device__ Element element(int n, int k, float w, float rstd, Gate gate) const {
        return element_of<kGated>(to_float(x[n].at[k]), kGated ? to_float(z[kGated ? n : 0].at[k]) : 0.0f,
                                  grad_y[n].at[k], w, rstd, gate);
    }
};

template <int N>
__device__ inline void add_pack(float* p, const Pack<float, N>& v) {
    Pack<float, N> sum = load_pack<N>(p);
#pragma unroll
    for (int k = 0; k < N; ++k) sum.at[k] += v.at[k];
    store_pack(p, sum);
}

// A block takes `chunk` rows of one group (blockIdx.y), a team one row at a time.
template <class X, class Y, bool kGated, int N, int kValues, int kTeam>
__global__ void __launch_bounds__(kThreads, 2) Backward(const __grid_constant__ BackwardParams<X, Y> p) {
    using Row = BackwardRow<X, Y, kGated, N, kValues, kTeam>;
    constexpr int kTeams = kThreads / kTeam;
    __shared__ float scratch[kThreads / kWarp], columns[kTeams][kTeam * kValues];
    const auto& c = p.call;
    const int64_t width = c.in.x.shape[1] / c.options.groups;
    const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
    const int64_t begin = blockIdx.x * p.chunk;
    const int64_t end = begin + p.chunk < c.in.x.shape[0] ? begin + p.chunk : c.in.x.shape[0];
    const Gate gate = c.options.gate;
    float sums[Row::kPacks][N] = {};
    for (int64_t first = begin; first < end; first += kTeams) {
        const bool live = first + team < end;
        const Place at{live ? first + team : begin, blockIdx.y, blockIdx.y * width};
        Row row;
        row.load(c, at, width);
        const float rstd = c.rstd.data[at.row * c.rstd.stride + at.group];
        float dot = 0;
#pragma unroll
        for (int n = 0; n < Row::kPacks; ++n) {
            const int64_t j = (n * kTeam + lane) * N;
            if (!live || j >= width) continue;
            const Pack<float, N> w = load_weight<N>(c.in.weight, c.options.unit_offset, at.first + j);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const Element e = row.element(n, k, w.at[k], rstd, gate);
                dot += e.g * e.normed;
                sums[n][k] += e.gated;
            }
        }
        const float mean = team_sum<kTeam>(dot, scratch) / static_cast<float>(width);
        if (!live) continue;
#pragma unroll
        for (int n = 0; n < Row::kPacks; ++n) {
            const int64_t j = (n * kTeam + lane) * N;
            if (j >= width) continue;
            const Pack<float, N> w = load_weight<N>(c.in.weight, c.options.unit_offset, at.first + j);
            Pack<float, N> grad_x, grad_z;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const Element e = row.element(n, k, w.at[k], rstd, gate);
                const Slopes s = slopes_of<kGated>(e, to_float(row.x[n].at[k]), row.grad_y[n].at[k], w.at[k],
                                                   rstd, mean, gate);
                grad_x.at[k] = s.x;
                grad_z.at[k] = s.z;
            }
            if (c.grad.x.data != nullptr)
                add_pack(c.grad.x.data + at.row * c.grad.x.stride + at.first + j, grad_x);
            if (kGated && c.grad.z.data != nullptr)
                add_pack(c.grad.z.data + at.row * c.grad.z.stride + at.first + j, grad_z);
        }
    }
    if (p.partial == nullptr) return;
#pragma unroll
    for (int n = 0; n < Row::kPacks; ++n)
#pragma unroll
        for (int k = 0; k < N; ++k) columns[team][(n * kTeam + lane) * N + k] = sums[n][k];
    __syncthreads();
    for (int64_t j = threadIdx.x; j < width; j += kThreads) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kTeams; ++i) sum += columns[i][j];
        p.partial[blockIdx.x * c.in.x.shape[1] + blockIdx.y * width + j] = sum;
    }
}

// Any width and alignment.
template <class X, class Y, bool kGated>
__global__ void __launch_bounds__(kThreads) BackwardPlain(const __grid_constant__ BackwardParams<X, Y> p) {
    __shared__ float scratch[kThreads / kWarp];
    const auto& c = p.call;
    const int64_t d = c.in.x.shape[1], width = d / c.options.groups, first = blockIdx.y * width;
    const int64_t begin = blockIdx.x * p.chunk;
    const int64_t end = begin + p.chunk < c.in.x.shape[0] ? begin + p.chunk : c.in.x.shape[0];
    const Gate gate = c.options.gate;
    for (int64_t row = begin; row < end; ++row) {
        const X* x = c.in.x.data + row * c.in.x.stride + first;
        const Y* z = c.in.z.data + row * c.in.z.stride + first;
        const float* grad_y = c.grad_y.data + row * c.grad_y.stride + first;
        const float rstd = c.rstd.data[row * c.rstd.stride + blockIdx.y];
        const auto weight = [&](int64_t j) {
            return load_weight<1>(c.in.weight, c.options.unit_offset, first + j).at[0];
        };
        const auto element = [&](int64_t j) {
            return element_of<kGated>(to_float(x[j]), kGated ? to_float(z[j]) : 0.0f, grad_y[j], weight(j),
                                      rstd, gate);
        };
        float dot = 0;
        for (int64_t j = threadIdx.x; j < width; j += kThreads) {
            const Element e = element(j);
            dot += e.g * e.normed;
            if (p.partial == nullptr) continue;
            float& sum = p.partial[blockIdx.x * d + first + j];
            sum = (row == begin ? 0.0f : sum) + e.gated;
        }
        const float mean = block_sum(dot, scratch) / static_cast<float>(width);
        for (int64_t j = threadIdx.x; j < width; j += kThreads) {
            const Slopes s =
                slopes_of<kGated>(element(j), to_float(x[j]), grad_y[j], weight(j), rstd, mean, gate);
            if (c.grad.x.data != nullptr) c.grad.x.data[row * c.grad.x.stride + first + j] += s.x;
            if (kGated && c.grad.z.data != nullptr) c.grad.z.data[row * c.grad.z.stride + first + j] += s.z;
        }
    }
}

struct WeightColumns {
    float* grad_weight;
    __device__ float* operator()(int64_t column) const { return grad_weight + column; }
};

template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <class T, int R>
bool aligned(const View<T, R>& v, int64_t n) {
    return v.data == nullptr || packable(v.data, R == 1 ? 0 : v.stride, n);
}
// The weight is read by packs of 16 bytes, two of them where N is 8.
bool aligned_weight(const View<const float, 1>& weight) { return aligned(weight, 4); }

template <class X, class Y, bool kAdd, bool kGated>
void forward(const Exec& ex, const RmsNormCall<X, Y>& p) {
    constexpr int N = sizeof(X) == 2 && sizeof(Y) == 2 && !kAdd ? 8 : 4;
    const int64_t t = p.in.x.shape[0], groups = p.options.groups, width = p.in.x.shape[1] / groups;
    const auto launch = [&](auto values, auto team) {
        constexpr int kTeams = kThreads / decltype(team)::value;
        // As many blocks as run at the same time; with an f32 residual and f32 x a row for each team is
        // faster (measured: README.md).
        const auto kernel = Forward<X, Y, kAdd, kGated, N, decltype(values)::value, decltype(team)::value>;
        static const int resident = [&] {
            int blocks = 1;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), kOp);
            return blocks;
        }();
        const int64_t most =
            kAdd && sizeof(X) == 4 ? t : std::max<int64_t>(1, resident * ex.cuda->multiprocessors() / groups);
        const dim3 grid(static_cast<unsigned>(std::min<int64_t>(most, (t + kTeams - 1) / kTeams)),
                        static_cast<unsigned>(groups));
        kernel<<<grid, kThreads, 0, stream_of(ex)>>>(p);
    };
    const bool packs = width % N == 0 && aligned(p.in.x, N) && aligned(p.in.z, N) && aligned(p.y, N) &&
                       aligned(p.residual, N) && aligned(p.residual_out, N) && aligned_weight(p.in.weight);
    // Two warps a row or one, where that fills the machine.
    const bool many = t * groups >= 16 * ex.cuda->multiprocessors();
    if (!packs || width > kThreads * 24) {
        ForwardPlain<X, Y><<<static_cast<unsigned>(t * groups), kThreads, 0, stream_of(ex)>>>(p);
    } else if (width <= kWarp * 8) {
        launch(Int<8>{}, Int<kWarp>{});
    } else if (many && width <= kWarp * 24) {
        launch(Int<24>{}, Int<kWarp>{});
    } else if (many && width <= 2 * kWarp * 24) {
        launch(Int<24>{}, Int<2 * kWarp>{});
    } else if (width <= kThreads * 8) {
        launch(Int<8>{}, Int<kThreads>{});
    } else {
        launch(Int<24>{}, Int<kThreads>{});
    }
    check_launch(kOp);
}

template <class X, class Y, bool kGated>
void backward(const Exec& ex, const RmsNormBackwardCall<X, Y>& c) {
    constexpr int N = 4;
    const int64_t t = c.in.x.shape[0], d = c.in.x.shape[1], groups = c.options.groups, width = d / groups;
    // Two blocks for each multiprocessor; a multiple of 8 rows keeps all teams busy.
    const int64_t blocks = std::max<int64_t>(1, 2 * ex.cuda->multiprocessors() / groups);
    const int64_t chunk = ((t + blocks - 1) / blocks + 7) / 8 * 8, chunks = (t + chunk - 1) / chunk;
    const Scratch<float> partial(ex, c.grad.weight ? static_cast<size_t>(chunks * d) : 0);
    const BackwardParams<X, Y> p{c, c.grad.weight ? partial.data() : nullptr, chunk};
    const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(groups));
    const auto launch = [&](auto values, auto team) {
        Backward<X, Y, kGated, N, decltype(values)::value, decltype(team)::value>
            <<<grid, kThreads, 0, stream_of(ex)>>>(p);
    };
    const bool packs = width % N == 0 && aligned(c.in.x, N) && aligned(c.in.z, N) && aligned(c.grad_y, N) &&
                       aligned(c.grad.x, N) && aligned(c.grad.z, N) && aligned_weight(c.in.weight);
    if (!packs || width > kThreads * 24) {
        BackwardPlain<X, Y, kGated><<<grid, kThreads, 0, stream_of(ex)>>>(p);
    } else if (width <= kWarp * 8) {
        launch(Int<8>{}, Int<kWarp>{});
    } else if (width <= kWarp * 24) {
        launch(Int<24>{}, Int<kWarp>{});
    } else if (width <= 2 * kWarp * 24) {
        launch(Int<24>{}, Int<2 * kWarp>{});
    } else {
        launch(Int<24>{}, Int<kThreads>{});
    }
    check_launch(kOp);
    if (!c.grad.weight) return;
    add_column_sums(ex, partial.data(), chunks, d, WeightColumns{c.grad.weight.data}, kOp);
}

}  // namespace

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormCall<X, Y>& call) {
    if (call.in.x.shape[0] == 0) return;
    if (call.options.gate != Gate::none) return forward<X, Y, false, true>(ex, call);
    call.residual ? forward<X, Y, true, false>(ex, call) : forward<X, Y, false, false>(ex, call);
}

template <class X, class Y>
void rms_norm_backward(const Exec& ex, const RmsNormBackwardCall<X, Y>& call) {
    if (call.in.x.shape[0] == 0) return;
    call.options.gate == Gate::none ? backward<X, Y, false>(ex, call) : backward<X, Y, true>(ex, call);
}

template void rms_norm(const Exec&, const RmsNormCall<float, float>&);
template void rms_norm(const Exec&, const RmsNormCall<float, bf16>&);
template void rms_norm(const Exec&, const RmsNormCall<bf16, bf16>&);
template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<float, float>&);
template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<float, bf16>&);
template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<bf16, bf16>&);

}  // namespace ssm::cuda
