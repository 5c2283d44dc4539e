// Private to this folder, and to ops/cross_entropy on a GPU: the pieces that linear.cpp puts together.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/ops/linear/linear.h"

namespace ssm {

class OneDnnWeight;  // linear_onednn.cpp's

struct PackedWeight::State {
    explicit State(Tensor w) : weight(std::move(w)) {}
    Tensor weight;  // [o i]
    std::mutex mutex;
    std::shared_ptr<OneDnnWeight> packed;  // made under the mutex by the first product that wants it
};

namespace linear_detail {

// A matrix in memory, f32 or bf16: row r starts at data + r * stride elements.
struct Matrix {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride = 0;
    bool transpose = false;  // stored as [columns rows]
};

// C[m n] = alpha op(A)[m k] op(B)[k n] + beta C + bias[n].  A and B have one dtype; C is f32, or bf16 when
// they are (then alpha = 1, and on the CPU beta = 0; on a GPU C may be bf16 whatever they are). beta and bias
// exclude each other.
struct Product {
    int64_t m = 0, n = 0, k = 0;
    Matrix a = {}, b = {};
    void* c = nullptr;
    DType c_dtype = DType::f32;
    int64_t c_stride = 0;
    const float* bias = nullptr;
    float alpha = 1.0f, beta = 0.0f;
};

// linear_onednn.cpp. None of the dimensions may be 0.
void product_onednn(const Exec& ex, const Product& p);
// B is the weight's blocked copy, made here if it is not there yet; p.b is its plain form.
void product_packed(const Exec& ex, const Product& p, PackedWeight::State& weight);
// True where oneDNN has vector bf16 products on this machine (AVX-512); elsewhere f32 is faster.
bool onednn_has_fast_bf16();

// linear.cpp: whether products in bf16 are computed as such here; else their inputs become f32.
bool products_run_in_bf16();

// linear_plain_cpu.cpp: the same product without oneDNN.
void product_plain(const Exec& ex, const Product& p);

// linear_cpu.cpp: y = x W^T + bias for few rows t, the weight streamed once. x is rounded to bf16 when the
// weight is bf16, as in the large products.
struct FewRows {
    int64_t t = 0, i = 0, o = 0;
    Matrix x = {}, weight = {};  // [t i], [o i]
    const float* bias = nullptr;
    void* y = nullptr;
    DType y_dtype = DType::f32;
    int64_t y_stride = 0;
};
void few_rows(const Exec& ex, const FewRows& args);
// Up to this many rows few_rows is used (measured, README.md): with a packed copy at hand, and without one,
// where oneDNN would first have to reorder the weight.
inline constexpr int64_t kFewRowsPacked = 3, kFewRowsPlain = 8;

// to[r,c] = from[r,c] for f32 -> bf16 (round to nearest even), bf16 -> f32 and equal types.
void convert_rows(const Exec& ex, int64_t rows, int64_t columns, const Matrix& from, void* to, DType to_dtype,
                  int64_t to_stride);

// sum[c] += sum_r a[r,c]; rows are added in order, so the result does not depend on threads.
void add_column_sums(const Exec& ex, View<const float, 2> a, float* sum) noexcept;

}  // namespace linear_detail

// The same pieces on a GPU: all pointers are device memory.
namespace cuda {

// linear_cuda.cu, by cuBLASLt. Any dimension but m and n may be 0. A product in bf16 with an operand whose
// rows are not aligned to 16 bytes goes through an aligned copy of it.
void product(const Exec& ex, const linear_detail::Product& p);
void convert_rows(const Exec& ex, int64_t rows, int64_t columns, const linear_detail::Matrix& from, void* to,
                  DType to_dtype, int64_t to_stride);
// a: [rows columns], f32 or bf16. Fixed order of summation: the same bytes from run to run.
void add_column_sums(const Exec& ex, int64_t rows, int64_t columns, const linear_detail::Matrix& a,
                     float* sum);

// linear_few_rows_cuda.cu: t <= 8, with a bf16 weight t <= 4.
void few_rows(const Exec& ex, const linear_detail::FewRows& args);

}  // namespace cuda
}  // namespace ssm
