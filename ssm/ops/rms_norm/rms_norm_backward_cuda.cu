// CUDA kernels of rms_norm's gradients. A team of threads keeps its row (of one group) in registers, and over
// all its rows its columns' sums for grad_weight, which a block leaves once. Rows that packs of 16 bytes
// cannot read, and those too wide for registers, go through a plain loop.
#include <algorithm>

#include "ssm/core/cuda/column_sums.cuh"
#include "ssm/ops/rms_norm/rms_norm_cuda.cuh"

namespace ssm::cuda {
namespace {

using namespace rms_norm_detail;

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

// What a gradient is added to: zeros where it is written or not wanted.
template <int N, class T>
__device__ inline Pack<T, N> old_of(const View<T, 2>& grad, bool set, int64_t row, int64_t column) {
    if (grad.data != nullptr && !set) return load_pack<N>(grad.data + row * grad.stride + column);
    return {};
}
template <int N, class X, class Y>
__device__ inline void store_grad_x(const RmsNormBackwardCall<X, Y>& c, int64_t row, int64_t column,
                                    const Pack<float, N>& grad, const Pack<X, N>& old) {
    if (c.grad.x.data == nullptr) return;
    Pack<X, N> sum;
    Pack<Y, N> branch;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float total = to_float(old.at[k]) + grad.at[k];
        sum.at[k] = from_float<X>(total);
        branch.at[k] = from_float<Y>(total);
    }
    store_pack(c.grad.x.data + row * c.grad.x.stride + column, sum);
    if (c.grad.branch.data != nullptr)
        store_pack(c.grad.branch.data + row * c.grad.branch.stride + column, branch);
}
template <int N, class X, class Y>
__device__ inline void store_grad_z(const RmsNormBackwardCall<X, Y>& c, int64_t row, int64_t column,
                                    const Pack<float, N>& grad, const Pack<Y, N>& old) {
    if (c.grad.z.data == nullptr) return;
    Pack<Y, N> sum;
#pragma unroll
    for (int k = 0; k < N; ++k) sum.at[k] = from_float<Y>(to_float(old.at[k]) + grad.at[k]);
    store_pack(c.grad.z.data + row * c.grad.z.stride + column, sum);
}

template <class X, class Y, bool kGated, int N, int kValues, int kTeam>
struct BackwardRow {
    static constexpr int kPacks = kValues / N;
    // What the gradients are added to is read with the rest where there are registers for it.
    static constexpr bool kReadsAhead = !kGated;
    Pack<X, N> x[kPacks], old_x[kReadsAhead ? kPacks : 1];
    Pack<Y, N> z[kGated ? kPacks : 1], grad_y[kPacks];

    __device__ static int64_t column(int n) {
        return (n * kTeam + static_cast<int>(threadIdx.x) % kTeam) * N;
    }
    __device__ void load(const RmsNormBackwardCall<X, Y>& c, const Place& at, int64_t width) {
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            if (column(n) >= width) continue;
            const int64_t j = at.first + column(n);
            x[n] = load_pack<N>(c.in.x.data + at.row * c.in.x.stride + j);
            grad_y[n] = load_pack<N>(c.grad_y.data + at.row * c.grad_y.stride + j);
            if constexpr (kGated) z[n] = load_pack<N>(c.in.z.data + at.row * c.in.z.stride + j);
            if constexpr (kReadsAhead) old_x[n] = old_of<N>(c.grad.x, c.grad.set_x, at.row, j);
        }
    }
    __device__ Element element(int n, int k, float w, float rstd, Gate gate) const {
        return element_of<kGated>(to_float(x[n].at[k]), kGated ? to_float(z[kGated ? n : 0].at[k]) : 0.0f,
                                  to_float(grad_y[n].at[k]), w, rstd, gate);
    }
    // Adds to grad_weight's sums; returns the thread's part of sum(grad_v^ v^).
    __device__ float reduce(const RmsNormBackwardCall<X, Y>& c, const Place& at, int64_t width, float rstd,
                            float (*sums)[N]) const {
        float dot = 0;
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            if (column(n) >= width) continue;
            const Pack<float, N> w = load_weight<N>(c.in.weight, c.options.unit_offset, at.first + column(n));
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const Element e = element(n, k, w.at[k], rstd, c.options.gate);
                dot += e.g * e.normed;
                sums[n][k] += e.gated;
            }
        }
        return dot;
    }
    __device__ void store(const RmsNormBackwardCall<X, Y>& c, const Place& at, int64_t width, float rstd,
                          float mean) const {
#pragma unroll
        for (int n = 0; n < kPacks; ++n) {
            if (column(n) >= width) continue;
            const int64_t j = at.first + column(n);
            const Pack<float, N> w = load_weight<N>(c.in.weight, c.options.unit_offset, j);
            Pack<float, N> grad_x, grad_z;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const Element e = element(n, k, w.at[k], rstd, c.options.gate);
                const Slopes s = slopes_of<kGated>(e, to_float(x[n].at[k]), to_float(grad_y[n].at[k]),
                                                   w.at[k], rstd, mean, c.options.gate);
                grad_x.at[k] = s.x;
                grad_z.at[k] = s.z;
            }
            if constexpr (kReadsAhead)
                store_grad_x<N>(c, at.row, j, grad_x, old_x[n]);
            else
                store_grad_x<N>(c, at.row, j, grad_x, old_of<N>(c.grad.x, c.grad.set_x, at.row, j));
            if constexpr (kGated)
                store_grad_z<N>(c, at.row, j, grad_z, old_of<N>(c.grad.z, c.grad.set_z, at.row, j));
        }
    }
};

// A block takes `chunk` rows of one group (blockIdx.y), a team one row at a time.
template <class X, class Y, bool kGated, int N, int kValues, int kTeam>
__global__ void __launch_bounds__(kThreads, 2) Backward(const __grid_constant__ BackwardParams<X, Y> p) {
    using Row = BackwardRow<X, Y, kGated, N, kValues, kTeam>;
    constexpr int kTeams = kThreads / kTeam;
    __shared__ float scratch[kThreads / kWarp], columns[kTeams][kTeam * kValues];
    const auto& c = p.call;
    const int64_t width = c.in.x.shape[1] / c.options.groups;
    const int team = threadIdx.x / kTeam;
    const int64_t begin = blockIdx.x * p.chunk;
    const int64_t end = begin + p.chunk < c.in.x.shape[0] ? begin + p.chunk : c.in.x.shape[0];
    float sums[Row::kPacks][N] = {};
    // All teams of a block go round equally often: they share its barriers.
    for (int64_t first = begin; first < end; first += kTeams) {
        const bool live = first + team < end;
        const Place at{live ? first + team : begin, blockIdx.y, blockIdx.y * width};
        Row row;
        float rstd = 0, dot = 0;
        if (live) {
            row.load(c, at, width);
            rstd = c.rstd.data[at.row * c.rstd.stride + at.group];
            dot = row.reduce(c, at, width, rstd, sums);
        }
        const float mean = team_sum<kTeam>(dot, scratch) / static_cast<float>(width);
        if (live) row.store(c, at, width, rstd, mean);
    }
    if (p.partial == nullptr) return;
#pragma unroll
    for (int n = 0; n < Row::kPacks; ++n)
#pragma unroll
        for (int k = 0; k < N; ++k) columns[team][Row::column(n) + k] = sums[n][k];
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
        const Y* grad_y = c.grad_y.data + row * c.grad_y.stride + first;
        const float rstd = c.rstd.data[row * c.rstd.stride + blockIdx.y];
        const auto weight = [&](int64_t j) {
            return load_weight<1>(c.in.weight, c.options.unit_offset, first + j).at[0];
        };
        const auto element = [&](int64_t j) {
            return element_of<kGated>(to_float(x[j]), kGated ? to_float(z[j]) : 0.0f, to_float(grad_y[j]),
                                      weight(j), rstd, gate);
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
            const Slopes s = slopes_of<kGated>(element(j), to_float(x[j]), to_float(grad_y[j]), weight(j),
                                               rstd, mean, gate);
            const Pack<float, 1> grad_x{{s.x}}, grad_z{{s.z}};
            store_grad_x<1>(c, row, first + j, grad_x, old_of<1>(c.grad.x, c.grad.set_x, row, first + j));
            if constexpr (kGated)
                store_grad_z<1>(c, row, first + j, grad_z, old_of<1>(c.grad.z, c.grad.set_z, row, first + j));
        }
    }
}

struct WeightColumns {
    float* grad_weight;
    __device__ float* operator()(int64_t column) const { return grad_weight + column; }
};

template <class X, class Y, bool kGated>
void backward(const Exec& ex, const RmsNormBackwardCall<X, Y>& c) {
    constexpr int N = sizeof(X) == 2 && sizeof(Y) == 2 ? 8 : 4;
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
                       aligned(c.grad.x, N) && aligned(c.grad.z, N) && aligned(c.grad.branch, N) &&
                       aligned_weight(c.in.weight);
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
void rms_norm_backward(const Exec& ex, const RmsNormBackwardCall<X, Y>& call) {
    if (call.in.x.shape[0] == 0) return;
    call.options.gate == Gate::none ? backward<X, Y, false>(ex, call) : backward<X, Y, true>(ex, call);
}

template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<float, float>&);
template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<float, bf16>&);
template void rms_norm_backward(const Exec&, const RmsNormBackwardCall<bf16, bf16>&);

}  // namespace ssm::cuda
