// CUDA kernel of conv_linear. A cluster takes some sequences; each of its 8 blocks takes an eighth of the
// channels: their convolution's step, then their part of the product by the tensor cores, its weights as the
// rows of m16n8k16. The parts are summed over warps, then over the cluster, in a fixed order.
#include "ssm/core/cuda/cluster.cuh"
#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/words.cuh"
#include "ssm/ops/conv_linear/conv_linear_impl.h"

namespace ssm::cuda {
namespace {

constexpr std::string_view kOp = "conv_linear";
constexpr int kThreads = 256, kWarps = kThreads / kWarp, kCluster = 8, kTaps = 4;
// Of an m16n8k16 product: a lane's fragments of a run of 32 columns are 8 neighbouring ones.
constexpr int kTile = 16, kTokens = 8, kRun = 32, kPack = 8;
constexpr int kAcross = 2, kDeep = kWarps / kAcross;  // warps by rows of the weight, and by runs

struct Params {
    View<bf16, 2> x;    // [t d]
    const float* taps;  // [d 4]
    const float* bias;  // [d] or absent
    bool silu;
    View<bf16, 3> state;   // [any 3 d]
    const int32_t* slots;  // [t] or absent
    const bf16* weight;    // [o d]
    int64_t weight_stride;
    View<float, 2> y;  // [t o]
    int t, d, o;
};

__device__ inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The shared memory: the convolved x [kSeqs width + 8] in bf16, then the warps' sums [kDeep kSeqs o_padded].
template <int kTiles>
constexpr int kColumns = kAcross* kTiles* kTile + 4;  // of the sums: padded

template <int kTiles, int kSeqs>
size_t shared_bytes(int64_t width) {
    return static_cast<size_t>(kSeqs * (width + kPack)) * sizeof(bf16) +
           static_cast<size_t>(kDeep * kSeqs * kColumns<kTiles>) * sizeof(float);
}

// The block's channels begin .. begin + width of its sequences: x and the state in memory, x in `to` too.
template <int kSeqs>
__device__ inline void convolve(const Params& p, int s0, int begin, int width, bf16* to) {
    const int packs = width / kPack, at_once = kThreads / packs, mine = static_cast<int>(threadIdx.x);
    const int i = mine / packs, channel = mine % packs * kPack, c = begin + channel;
    const bool works = i < at_once;
    Pack<float, kTaps> taps[kPack];
    float bias[kPack];
    if (works) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
            taps[k] = load_pack<kTaps>(p.taps + (c + k) * kTaps);
            bias[k] = p.bias != nullptr ? p.bias[c + k] : 0.0f;
        }
    }
    wait_for_inputs();
    if (!works) return;
#pragma unroll 2
    for (int s = i; s < kSeqs; s += at_once) {
        Words<bf16, kPack> out = {};
        if (s0 + s < p.t) {
            const int64_t slot = p.slots != nullptr ? p.slots[s0 + s] : s0 + s;
            bf16* state = p.state.data + slot * p.state.stride + c;
            bf16* x = p.x.data + (s0 + s) * p.x.stride + c;
            Words<bf16, kPack> row[kTaps];
#pragma unroll
            for (int j = 0; j < kTaps; ++j)
                row[j] = load_words<kPack>(j < kTaps - 1 ? state + static_cast<int64_t>(j) * p.d : x);
            float v[kPack];
#pragma unroll
            for (int k = 0; k < kPack; ++k) {
                v[k] = bias[k];
#pragma unroll
                for (int j = 0; j < kTaps; ++j) v[k] = fmaf(taps[k].at[j], row[j][k], v[k]);
                if (p.silu) v[k] = silu(v[k]);
            }
            out = to_words<bf16>(v);
#pragma unroll
            for (int j = 1; j < kTaps; ++j)
                store_words<kPack>(state + static_cast<int64_t>(j - 1) * p.d, row[j]);
            store_words<kPack>(x, out);
        }
        store_words<kPack>(to + s * (width + kPack) + channel, out);
    }
}

// A warp's runs of the product with its tiles of 16 rows of the weight.
template <int kTiles, int kSeqs>
struct Part {
    static constexpr int kSeqTiles = kSeqs / kTokens, kHeld = kTiles > 3 ? 1 : 2;  // runs held from the start
    Words<bf16, kPack> upper[kHeld][kTiles], lower[kHeld][kTiles];
    const bf16* rows;  // the lane's place in the weight

    __device__ void load(const Params& p, int width, int run, Words<bf16, kPack> (&high)[kTiles],
                         Words<bf16, kPack> (&low)[kTiles]) const {
        const int warp = threadIdx.x / kWarp,
                  first = warp % kAcross * kTiles * kTile + threadIdx.x % kWarp / 4;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            high[i] = low[i] = {};
            if (run * kRun >= width) continue;
            const int row = first + i * kTile;
            const bf16* at = rows + row * p.weight_stride + run * kRun;
            if (row < p.o) high[i] = load_words<kPack>(at);
            if (row + 8 < p.o) low[i] = load_words<kPack>(at + 8 * p.weight_stride);
        }
    }
    __device__ void fetch(const Params& p, int begin, int width) {
        rows = p.weight + begin + threadIdx.x % 4 * kPack;
#pragma unroll
        for (int u = 0; u < kHeld; ++u)
            load(p, width, static_cast<int>(threadIdx.x) / kWarp / kAcross + u * kDeep, upper[u], lower[u]);
    }
    // To sums [kDeep][kSeqs][kColumns].
    __device__ void run(const Params& p, int width, const bf16* x, float* sums) const {
        const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4, warp = threadIdx.x / kWarp,
                  deep = warp / kAcross, across = warp % kAcross;
        float c[kTiles][kSeqTiles][4] = {};
        const auto step = [&](int run, const Words<bf16, kPack>(&high)[kTiles],
                              const Words<bf16, kPack>(&low)[kTiles]) {
            Words<bf16, kPack> b[kSeqTiles];
#pragma unroll
            for (int s = 0; s < kSeqTiles; ++s)
                b[s] = load_words<kPack>(x + (s * kTokens + g) * (width + kPack) + run * kRun + q * kPack);
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int s = 0; s < kSeqTiles; ++s)
#pragma unroll
                    for (int h = 0; h < 4; h += 2)
                        multiply(c[i][s], high[i].at[h], low[i].at[h], high[i].at[h + 1], low[i].at[h + 1],
                                 b[s].at[h], b[s].at[h + 1]);
        };
#pragma unroll
        for (int u = 0; u < kHeld; ++u)
            if ((deep + u * kDeep) * kRun < width) step(deep + u * kDeep, upper[u], lower[u]);
#pragma unroll 2
        for (int run = deep + kHeld * kDeep; run * kRun < width; run += kDeep) {
            Words<bf16, kPack> high[kTiles], low[kTiles];
            load(p, width, run, high, low);
            step(run, high, low);
        }
        float* to = sums + deep * kSeqs * kColumns<kTiles> + across * kTiles * kTile + g;
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int s = 0; s < kSeqTiles; ++s)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    to[(s * kTokens + 2 * q + k % 2) * kColumns<kTiles> + i * kTile + k / 2 * 8] = c[i][s][k];
    }
};

// Grid: kCluster x groups of kSeqs sequences.
template <int kTiles, int kSeqs>
__global__ void __launch_bounds__(kThreads, 1) ConvLinear(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char memory[];
    allow_next();
    const int rank = static_cast<int>(blockIdx.x), s0 = static_cast<int>(blockIdx.y) * kSeqs,
              width = p.d / kCluster, begin = rank * width;
    auto* x = reinterpret_cast<bf16*>(memory);
    auto* sums = reinterpret_cast<float*>(x + kSeqs * (width + kPack));
    Part<kTiles, kSeqs> part;
    part.fetch(p, begin, width);
    for (int64_t row = threadIdx.x; row < p.o; row += kThreads)
        prefetch_l2(p.weight + row * p.weight_stride + begin, static_cast<uint32_t>(width * sizeof(bf16)));
    convolve<kSeqs>(p, s0, begin, width, x);
    __syncthreads();
    part.run(p, width, x, sums);
    __syncthreads();
    const auto at = [&](int e) { return sums + e / p.o * kColumns<kTiles> + e % p.o; };
    for (int e = static_cast<int>(threadIdx.x); e < kSeqs * p.o; e += kThreads) {
        float* sum = at(e);
        float total = *sum;
#pragma unroll
        for (int k = 1; k < kDeep; ++k) total += sum[k * kSeqs * kColumns<kTiles>];
        *sum = total;
    }
    cluster_barrier();
    for (int e = rank * kThreads + static_cast<int>(threadIdx.x); e < kSeqs * p.o; e += kThreads * kCluster) {
        float parts[kCluster], total = 0.0f;
#pragma unroll
        for (int k = 0; k < kCluster; ++k) parts[k] = load_from_rank(at(e), k);
#pragma unroll
        for (int k = 0; k < kCluster; ++k) total += parts[k];
        if (s0 + e / p.o < p.t) p.y.data[(s0 + e / p.o) * p.y.stride + e % p.o] = total;
    }
    cluster_barrier();
}

template <int kTiles, int kSeqs>
void launch(const Exec& ex, const Params& p) {
    const size_t bytes = shared_bytes<kTiles, kSeqs>(p.d / kCluster);
    const auto kernel = ConvLinear<kTiles, kSeqs>;
    static const bool allowed = [&] {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024), kOp);
        return true;
    }();
    static_cast<void>(allowed);
    launch_overlapped(ex, kOp, kernel,
                      {{kCluster, blocks_for(p.t, kSeqs)}, kThreads, bytes, static_cast<unsigned>(kCluster)},
                      p);
}

}  // namespace

bool conv_linear(const Exec& ex, const Tensor& x, const ConvStep& conv, const PackedWeight& weight,
                 const Tensor& y) {
    const Tensor& w = weight.weight();
    if (x.dtype() != DType::bf16 || w.dtype() != DType::bf16 || y.dtype() != DType::f32) return false;
    const Params p{.x = x.view<bf16, 2>(),
                   .taps = conv.weight.data,
                   .bias = conv.bias.data,
                   .silu = conv.activation == Activation::silu,
                   .state = conv.state.view<bf16, 3>(),
                   .slots = conv.slots.data,
                   .weight = reinterpret_cast<const bf16*>(w.raw()),
                   .weight_stride = w.stride(),
                   .y = y.view<float, 2>(),
                   .t = static_cast<int>(x.dim(0)),
                   .d = static_cast<int>(x.dim(1)),
                   .o = static_cast<int>(w.dim(0))};
    const bool fits = conv.weight.shape[1] == kTaps && conv.weight.stride == kTaps &&
                      packable(p.taps, kTaps, kTaps) && (!conv.bias || conv.bias.stride == 1) &&
                      p.d % (kCluster * kRun) == 0 && p.d <= kCluster * kThreads * kPack / 2 &&
                      packable(p.x.data, p.x.stride, kPack) &&
                      packable(p.state.data, p.state.stride, kPack) &&
                      packable(p.weight, p.weight_stride, kPack) && x.dim(0) <= 8 * 65535;
    if (!fits || p.o > 192) return false;
    if (p.o <= 96) {
        launch<3, 8>(ex, p);
    } else if (p.o <= 160) {
        launch<5, 8>(ex, p);
    } else {
        launch<6, 8>(ex, p);
    }
    return true;
}

}  // namespace ssm::cuda
