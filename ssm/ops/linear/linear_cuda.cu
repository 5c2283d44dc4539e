// Matrix products on a GPU by cuBLASLt, and the passes over rows around them. cuBLASLt counts in columns: to
// it a row-major C = A B is the column-major C^T = B^T A^T, so the operands change places.
#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <optional>

#include "ssm/core/cuda/context.h"
#include "ssm/core/cuda/numbers.cuh"
#include "ssm/ops/linear/linear_impl.h"

namespace ssm::cuda {
namespace {

using linear_detail::Matrix;
using linear_detail::Product;

constexpr std::string_view kOp = "linear";
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;  // in a grid's second dimension
constexpr size_t kWorkspace = size_t{32} << 20;
constexpr int64_t kRowBytes = 16;  // alignment that bf16's fast kernels want

void check_blas(cublasStatus_t status, std::string_view what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail(ErrorCode::io, kOp, "cuBLASLt: {}: {}", what, cublasLtGetStatusString(status));
}

template <class F>
decltype(auto) with_type(DType t, F&& f) {
    return dispatch_activation(t, kOp, std::forward<F>(f));
}

// ---- Passes over rows ----

struct ConvertParams {
    int64_t rows, columns;
    const void* from;
    void* to;
    int64_t from_stride, to_stride;
};

// A block is as wide as a narrow row, so that its other threads take other rows.
template <class From, class To, int N>
__global__ void __launch_bounds__(kThreads) Convert(const __grid_constant__ ConvertParams p) {
    const int64_t j = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (j >= p.columns) return;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    for (int64_t r = first; r < p.rows; r += int64_t{gridDim.y} * blockDim.y) {
        const Pack<From, N> x = load_pack<N>(static_cast<const From*>(p.from) + r * p.from_stride + j);
        Pack<To, N> y;
#pragma unroll
        for (int k = 0; k < N; ++k) y.at[k] = from_float<To>(to_float(x.at[k]));
        store_pack(static_cast<To*>(p.to) + r * p.to_stride + j, y);
    }
}

// c = from + bias + beta c, elementwise.
struct FinishParams {
    int64_t rows, columns;
    const float* from;  // absent: zeros
    int64_t from_stride;
    const float* bias;  // absent: zeros
    float beta;
    void* c;
    int64_t c_stride;
};

template <class C>
__global__ void __launch_bounds__(kThreads) Finish(const __grid_constant__ FinishParams p) {
    const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (j >= p.columns) return;
    const float bias = p.bias != nullptr ? p.bias[j] : 0.0f;
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        C* c = static_cast<C*>(p.c) + r * p.c_stride + j;
        float sum = (p.from != nullptr ? p.from[r * p.from_stride + j] : 0.0f) + bias;
        if (p.beta != 0.0f) sum = fmaf(p.beta, to_float(*c), sum);
        *c = from_float<C>(sum);
    }
}

void finish(const Exec& ex, const Product& p, const float* from, int64_t from_stride) {
    const FinishParams params{p.m, p.n, from, from_stride, p.bias, p.beta, p.c, p.c_stride};
    const dim3 grid(blocks_for(p.n, kThreads), static_cast<unsigned>(std::min(p.m, kMostBlocks)));
    with_type(p.c_dtype, [&]<class C>() { Finish<C><<<grid, kThreads, 0, stream_of(ex)>>>(params); });
    check_launch(kOp);
}

// Sums of a piece of the rows, 32 N columns a block: 8 warps, a lane N columns; then over the warps in order.
constexpr int kSumRows = 8;
constexpr int64_t kMostPieces = 64, kLeastRows = 128;

struct SumParams {
    int64_t rows, columns, stride;
    const void* a;
    int64_t piece;  // rows
    float* sums;    // [pieces columns]
};

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kSumRows) SumPieces(const __grid_constant__ SumParams p) {
    __shared__ float shared[kSumRows][N][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t c = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * N;
    const int64_t begin = blockIdx.y * p.piece;
    const int64_t end = begin + p.piece < p.rows ? begin + p.piece : p.rows;
    float sum[N] = {};
    if (c < p.columns) {
#pragma unroll 8
        for (int64_t r = begin + warp; r < end; r += kSumRows) {
            const Pack<T, N> x = load_pack<N>(static_cast<const T*>(p.a) + r * p.stride + c);
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] += to_float(x.at[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) shared[warp][k][lane] = sum[k];
    __syncthreads();
    if (warp > 0 || c >= p.columns) return;
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int w = 1; w < kSumRows; ++w) sum[k] += shared[w][k][lane];
        p.sums[blockIdx.y * p.columns + c + k] = sum[k];
    }
}

__global__ void __launch_bounds__(kThreads)
    AddPieces(const float* sums, int64_t pieces, int64_t columns, float* to) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= columns) return;
    float sum = 0.0f;
    for (int64_t i = 0; i < pieces; ++i) sum += sums[i * columns + c];
    to[c] += sum;
}

// ---- cuBLASLt ----

// How a product is run; plain data, so that a copy can get its own bias.
struct Plan {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};
// m n k, strides, types and transpositions, alignments, bias.
using Key = std::array<int64_t, 11>;
// The workspace is everybody's, in the order of the stream: a captured graph may keep its address.
struct Plans {
    static constexpr size_t kMost = 4096;
    std::map<Key, Plan> known;
    std::byte* workspace = nullptr;

    Plans() { check(cudaMalloc(&workspace, kWorkspace), kOp); }
    Plans(const Plans&) = delete;
    Plans& operator=(const Plans&) = delete;
    ~Plans() { cudaFree(workspace); }
};

cudaDataType_t type_of(DType t) { return t == DType::f32 ? CUDA_R_32F : CUDA_R_16BF; }

// The power of two, up to 256, that the address is a multiple of.
uint32_t alignment_of(const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p) | 256u;
    return static_cast<uint32_t>(address & (~address + 1));
}

// Rows and columns as stored.
std::array<int64_t, 2> stored(const Matrix& m, int64_t rows, int64_t columns) {
    return m.transpose ? std::array{columns, rows} : std::array{rows, columns};
}

void make_layout(cublasLtMatrixLayoutOpaque_t& layout, DType type, std::array<int64_t, 2> shape,
                 int64_t stride) {
    check_blas(cublasLtMatrixLayoutInit(&layout, type_of(type), static_cast<uint64_t>(shape[1]),
                                        static_cast<uint64_t>(shape[0]), std::max(stride, shape[1])),
               "layout");
}

template <class T>
void set(cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t what, T value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(&preference, what, &value, sizeof(value)), "preference");
}
template <class T>
void set(cublasLtMatmulDescOpaque_t& product, cublasLtMatmulDescAttributes_t what, T value) {
    check_blas(cublasLtMatmulDescSetAttribute(&product, what, &value, sizeof(value)), "product");
}

Plan make_plan(const Exec& ex, const Product& p) {
    Plan plan;
    check_blas(cublasLtMatmulDescInit(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
    set(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, p.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.product, CUBLASLT_MATMUL_DESC_TRANSB, p.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (p.bias != nullptr) {
        set(plan.product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        set(plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(p.bias));
    }
    make_layout(plan.a, p.b.dtype, stored(p.b, p.k, p.n), p.b.stride);
    make_layout(plan.b, p.a.dtype, stored(p.a, p.m, p.k), p.a.stride);
    make_layout(plan.c, p.c_dtype, {p.m, p.n}, p.c_stride);
    cublasLtMatmulPreferenceOpaque_t preference;
    check_blas(cublasLtMatmulPreferenceInit(&preference), "preference");
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
    // Parts of a sum in bf16 are not rounded before they are added.
    if (p.c_dtype == DType::bf16)
        set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b.data));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a.data));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
    cublasLtMatmulHeuristicResult_t best{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        ex.cuda->blas(), &plan.product, &plan.a, &plan.b, &plan.c, &plan.c, &preference, 1, &best, &count);
    if (status != CUBLAS_STATUS_SUCCESS || count == 0)
        fail(ErrorCode::unsupported, kOp, "cuBLASLt has no algorithm for m {}, n {}, k {} in {}", p.m, p.n,
             p.k, name_of(p.a.dtype));
    plan.algorithm = best.algo;
    return plan;
}

Plan plan_of(const Exec& ex, const Product& p, std::byte*& workspace) {
    const auto flags = static_cast<int64_t>(p.a.dtype) << 12 | static_cast<int64_t>(p.c_dtype) << 4 |
                       (p.a.transpose ? 4 : 0) | (p.b.transpose ? 2 : 0) | (p.bias != nullptr ? 1 : 0);
    const Key key{p.m,
                  p.n,
                  p.k,
                  p.a.stride,
                  p.b.stride,
                  p.c_stride,
                  flags,
                  alignment_of(p.a.data),
                  alignment_of(p.b.data),
                  alignment_of(p.c),
                  p.beta != 0.0f};
    const std::lock_guard lock(ex.cuda->products_mutex);
    if (!ex.cuda->products) ex.cuda->products = std::make_shared<Plans>();
    auto& plans = *static_cast<Plans*>(ex.cuda->products.get());
    auto& known = plans.known;
    workspace = plans.workspace;
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    if (known.size() >= Plans::kMost) known.clear();
    return known.emplace(key, make_plan(ex, p)).first->second;
}

void run(const Exec& ex, const Product& p) {
    std::byte* workspace = nullptr;
    Plan plan = plan_of(ex, p, workspace);
    if (p.bias != nullptr)
        set(plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(p.bias));
    check_blas(cublasLtMatmul(ex.cuda->blas(), &plan.product, &p.alpha, p.b.data, &plan.a, p.a.data, &plan.b,
                              &p.beta, p.c, &plan.c, p.c, &plan.c, &plan.algorithm, workspace, kWorkspace,
                              stream_of(ex)),
               "product");
}

bool rows_aligned(const void* p, int64_t stride, DType type) {
    return reinterpret_cast<uintptr_t>(p) % kRowBytes == 0 &&
           stride * static_cast<int64_t>(size_of(type)) % kRowBytes == 0;
}

// m, or a copy of it with aligned rows held by `storage`.
Matrix aligned(const Exec& ex, const Matrix& m, std::array<int64_t, 2> shape,
               std::optional<Scratch<bf16>>& storage) {
    const auto [rows, columns] = shape;
    if (m.dtype != DType::bf16 || rows_aligned(m.data, m.stride, m.dtype)) return m;
    const int64_t stride = (columns + 7) / 8 * 8;
    storage.emplace(ex, static_cast<size_t>(rows * stride));
    cuda::convert_rows(ex, rows, columns, m, storage->data(), m.dtype, stride);
    return {storage->data(), m.dtype, stride, m.transpose};
}

}  // namespace

void product(const Exec& ex, const Product& p) {
    if (p.m == 0 || p.n == 0) return;
    if (p.k == 0) return finish(ex, p, nullptr, 0);
    std::optional<Scratch<bf16>> a, b;
    Product q = p;
    q.a = aligned(ex, p.a, stored(p.a, p.m, p.k), a);
    q.b = aligned(ex, p.b, stored(p.b, p.k, p.n), b);
    // Else by f32 sums in aligned rows. (A bias of bf16 results would have to be bf16 too, and there are no
    // bf16 results of f32 products.)
    const bool direct = p.a.dtype == DType::f32 ? p.c_dtype == DType::f32
                                                : rows_aligned(p.c, p.c_stride, p.c_dtype) &&
                                                      (p.c_dtype == DType::f32 || p.bias == nullptr);
    if (direct) return run(ex, q);
    const int64_t n = (p.n + 3) / 4 * 4;
    const Scratch<float> sums(ex, static_cast<size_t>(p.m * n));
    q.c = sums.data();
    q.c_dtype = DType::f32;
    q.c_stride = n;
    q.bias = nullptr;
    q.beta = 0.0f;
    run(ex, q);
    finish(ex, p, sums.data(), n);
}

void convert_rows(const Exec& ex, int64_t rows, int64_t columns, const Matrix& from, void* to, DType to_dtype,
                  int64_t to_stride) {
    if (rows == 0 || columns == 0) return;
    ConvertParams p{rows, columns, from.data, to, from.stride, to_stride};
    if (from.stride == columns && to_stride == columns) p.rows = 1, p.columns = rows * columns;
    const auto aligned = [&](const void* data, int64_t stride, DType type) {
        return reinterpret_cast<uintptr_t>(data) % kRowBytes == 0 &&
               (p.rows == 1 || stride * static_cast<int64_t>(size_of(type)) % kRowBytes == 0);
    };
    const bool packs =
        p.columns % 8 == 0 && aligned(from.data, from.stride, from.dtype) && aligned(to, to_stride, to_dtype);
    const int64_t across = packs ? p.columns / 8 : p.columns;
    const auto width =
        static_cast<unsigned>(std::min<uint64_t>(kThreads, std::bit_ceil(static_cast<uint64_t>(across))));
    const dim3 block(width, kThreads / width);
    const dim3 grid(blocks_for(across, width),
                    static_cast<unsigned>(std::min<int64_t>(blocks_for(p.rows, block.y), kMostBlocks)));
    with_type(from.dtype, [&]<class From>() {
        with_type(to_dtype, [&]<class To>() {
            if (packs) {
                Convert<From, To, 8><<<grid, block, 0, stream_of(ex)>>>(p);
            } else {
                Convert<From, To, 1><<<grid, block, 0, stream_of(ex)>>>(p);
            }
        });
    });
    check_launch(kOp);
}

void add_column_sums(const Exec& ex, int64_t rows, int64_t columns, const Matrix& a, float* sum) {
    if (rows == 0 || columns == 0) return;
    const int64_t piece = std::max(kLeastRows, (rows + kMostPieces - 1) / kMostPieces);
    const int64_t pieces = (rows + piece - 1) / piece;
    const Scratch<float> sums(ex, static_cast<size_t>(pieces * columns));
    const SumParams p{rows, columns, a.stride, a.data, piece, sums.data()};
    with_type(a.dtype, [&]<class T>() {
        constexpr int N = 4;
        const bool packs = columns % N == 0 && packable(static_cast<const T*>(a.data), a.stride, N);
        const dim3 grid(blocks_for(columns, kWarp * (packs ? N : 1)), static_cast<unsigned>(pieces));
        const auto kernel = packs ? SumPieces<T, N> : SumPieces<T, 1>;
        kernel<<<grid, kWarp * kSumRows, 0, stream_of(ex)>>>(p);
    });
    check_launch(kOp);
    AddPieces<<<blocks_for(columns, kThreads), kThreads, 0, stream_of(ex)>>>(sums.data(), pieces, columns,
                                                                             sum);
    check_launch(kOp);
}

}  // namespace ssm::cuda
