// CUDA kernels of rms_norm. A team of threads keeps its row (of one group) in registers from the sum of
// squares to the scaling, so memory is read and written once. Rows that packs of 16 bytes cannot read, and
// those too wide for registers, go through a plain loop.
#include <algorithm>

#include "ssm/core/cuda/launch.cuh"
#include "ssm/ops/rms_norm/rms_norm_cuda.cuh"

namespace ssm::cuda {
namespace {

using namespace rms_norm_detail;

constexpr int64_t kStepRows = 512;  // of a step of decoding, at most

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
    allow_next();
    wait_for_inputs();
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
        // A step's kernel is short, and begins before the one before it has ended.
        if (t <= kStepRows) return launch_overlapped(ex, kOp, kernel, {grid, kThreads}, p);
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

}  // namespace

template <class X, class Y>
void rms_norm(const Exec& ex, const RmsNormCall<X, Y>& call) {
    if (call.in.x.shape[0] == 0) return;
    if (call.options.gate != Gate::none) return forward<X, Y, false, true>(ex, call);
    call.residual ? forward<X, Y, true, false>(ex, call) : forward<X, Y, false, false>(ex, call);
}

template void rms_norm(const Exec&, const RmsNormCall<float, float>&);
template void rms_norm(const Exec&, const RmsNormCall<float, bf16>&);
template void rms_norm(const Exec&, const RmsNormCall<bf16, bf16>&);

}  // namespace ssm::cuda
