// Linear layer: y = x W^T + bias.
//
//   y[t,o] = sum_i x[t,i] weight[o,i] + bias[o]
//
// Shapes     x: [t i]   weight: [o i]   bias: [o] f32 or absent   y: [t o].  Rows of x and y may be strided.
// Types      (x, weight, y): (f32, f32, f32), (bf16, bf16, f32), (bf16, bf16, bf16), (f32, bf16, f32),
//            (f32, bf16, bf16), (bf16, f32, f32), (bf16, f32, bf16). Mixed products run in bf16 when the
//            weight is bf16.
// Numerics   f32 accumulation; rel. L2 error vs f64 <= 1e-5 (f32), 1e-2 (bf16).
// Cost       2 t i o FLOP. t large: oneDNN, compute bound. t small (decoding): the weight is read once,
//            bound by memory: floor = o i sizeof(weight) / bandwidth.
// GPU        cuBLASLt; t <= 8, with a bf16 weight t <= 4 (2 if it is large_on_gpu), a kernel of our own. A
//            PackedWeight is the plain weight. f32 is f32 (no tf32). The first product of a shape chooses its
//            algorithm: call once before capturing a CUDA graph. With ex.matmul == bf16 both x and weight are
//            rounded, whatever their types (t > 8).
#pragma once

#include <memory>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"

namespace ssm {

// A weight [o i] and, made at the first product that wants it, its blocked copy for oneDNN ("packed once").
// Cheap to copy; the copies share. Not for weights that training changes. Thread-safe.
class PackedWeight {
public:
    PackedWeight() = default;
    explicit PackedWeight(Tensor weight);  // [o i], dense, f32 or bf16
    explicit operator bool() const { return state_ != nullptr; }
    const Tensor& weight() const;  // [o i] as given

    struct State;  // linear.cpp's
    State& state() const { return *state_; }

private:
    std::shared_ptr<State> state_;
};

// Whether a weight [o i] has 8 MiB and more in rows of 2 KiB and more.
bool large_on_gpu(const Tensor& weight);
// The most rows of x that a GPU's own kernels take; more are cuBLASLt's (measured: norm_linear's README.md).
int64_t few_rows_on_gpu(const Tensor& weight);

// For weights that do not change (inference): t small takes the matrix-vector kernels, t large oneDNN on the
// packed copy.
void linear(const Exec& ex, const Tensor& x, const PackedWeight& weight, View<const float, 1> bias,
            const Tensor& y);

// y += x W^T + bias: a residual's sum.
void linear_add(const Exec& ex, const Tensor& x, const PackedWeight& weight, View<const float, 1> bias,
                View<float, 2> y);

// For weights that change (training). With ex.matmul == bf16, f32 inputs are rounded to bf16 first.
void linear(const Exec& ex, const Tensor& x, const Tensor& weight, View<const float, 1> bias,
            const Tensor& y);

// Adds: grad_x += grad_y W,  grad_weight += grad_y^T x,  grad_bias += column sums of grad_y. Absent ones are
// not computed. What `set` names is written instead of added to.
// Types: grad_x has x's, the gradients of weight and bias are f32. On the CPU all are f32, and with ex.matmul
// == bf16 the products' inputs are rounded to bf16. On a GPU grad_y, x and weight are f32 or bf16, in any
// mix: the products are bf16 when the weight is or ex.matmul says so (an operand in f32 is rounded into
// scratch, one in bf16 with rows aligned to 16 bytes is read where it is), else f32. Adding to a grad_x in
// bf16 rounds the sum once.
struct LinearBackwardSet {
    bool x = false, weight = false;
};
void linear_backward(const Exec& ex, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                     const Tensor& grad_x, View<float, 2> grad_weight, View<float, 1> grad_bias,
                     LinearBackwardSet set = {});

// C[m,n] = alpha op(A) op(B) + beta C in f32 (op = transpose if asked); the building block for other
// operators. Runs on ex.threads threads, or on the calling one inside a parallel region.
struct MatmulOptions {
    bool transpose_a = false, transpose_b = false;
    float alpha = 1.0f, beta = 0.0f;
};
void matmul(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> c,
            const MatmulOptions& options = {});

}  // namespace ssm
