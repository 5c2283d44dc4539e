// State space duality (Mamba-2): a scalar decay per head, computed in chunks as matrix products.
//
//   dt[t,h]  = clamp(softplus(dt_raw[t,h] + dt_bias[h]), dt_min, dt_max)     softplus if `dt_softplus`
//   S[t,h]   = exp(dt[t,h] A[h]) S[t-1,h] + dt[t,h] x[t,h] B[t,g(h)]^T       S: p x n, g(h) = h / (H / G)
//   y[t,h]   = S[t,h] C[t,g(h)] + D[h] x[t,h]
//
// In a chunk of q tokens, with l = cumsum(dt A) inside the chunk and X = dt x:
//   Y     = (tril(exp(l_i - l_j)) * (C B^T)) X + exp(l) * (C S_prev^T)
//   S_new = exp(l_q) S_prev + sum_j exp(l_q - l_j) X_j B_j^T
//
// Source     Dao & Gu 2024 (Mamba-2), section 6, listing 1.
// Shapes     x, y: [t h p] of T (f32 or bf16)   dt: [t h] of T   B, C: [t g n] of T, g divides h
//            A, dt_bias: [h] f32   D: [h 1] or [h p] f32   cu_seqlens: [s+1]
//            initial_state, final_state: [s h p n] f32.  Token rows may be strided. `y` must not alias.
// Numerics   decays, sums and states in f32; exp only of differences l_i - l_j <= 0, masked before exp.
//            rel. L2 error vs f64 <= 1e-5 (f32); bf16: y 1e-2, states 3e-3 (1e-5 from ssd_step). Where
//            the processor has bf16 products, the operands of the products are rounded to bf16.
//            CUDA, bf16: operands rounded to bf16 as well, y and grad x once per 128 of n; gradients 2e-2
//            (of A and dt_bias 5e-2 where their terms cancel); f32 gradients 1e-4; deterministic.
// Cost       2 t (q (g n + h p) + 2 h p n) FLOP with chunk q: matrix products; compute bound.
#pragma once

#include <limits>

#include "ssm/core/dtype.h"
#include "ssm/core/exec.h"
#include "ssm/core/view.h"
#include "ssm/ops/sequences.h"

namespace ssm {

template <class T>
struct SsdInputs {
    View<const T, 3> x;                  // [t h p]
    View<const T, 2> dt;                 // [t h]
    View<const float, 1> A;              // [h], negative
    View<const T, 3> B;                  // [t g n]
    View<const T, 3> C;                  // [t g n]
    View<const float, 2> D;              // [h 1] or [h p], or absent
    View<const float, 1> dt_bias;        // [h] or absent
    CuSeqlens cu_seqlens;                // [s+1]
    View<const float, 4> initial_state;  // [s h p n] or absent (zero)
    bool dt_softplus = true;
    float dt_min = 0.0f;  // clamp after softplus; applied only if dt_softplus
    float dt_max = std::numeric_limits<float>::infinity();
    Slots slots = {};  // the step: [s], rows of `state`, or absent
};

struct SsdOptions {
    // q; any value gives the same result within rounding. On a GPU products are of 64 tokens whatever it is,
    // and the states of longer chunks (512 and more) are fewer bytes to save: ssd_backward makes those
    // between again.
    int64_t chunk = 64;
};

// Number of saved states: sum over the sequences of ceil(length / chunk).
int64_t ssd_chunks(CuSeqlens cu_seqlens, int64_t chunk);

// y and, where present, final_state [s h p n] and chunk_states [chunks h p n] (the state entering each
// chunk).
template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, const SsdOptions& options = {});

// Which gradients are written instead of added to.
struct SsdSet {
    bool x = false, dt = false, B = false, C = false;
};

// Gradients: of x, dt, B and C of their type, the others f32. Added to unless `set` says otherwise (bf16 is
// added in f32 and rounded); absent ones are not computed. Rows may be strided: slices of the gradient of one
// projection.
template <class T>
struct SsdGradients {
    View<T, 3> x;
    View<T, 2> dt;  // of the raw dt, before bias, softplus and clamp
    View<float, 1> A;
    View<T, 3> B, C;
    View<float, 2> D;
    View<float, 1> dt_bias;
    View<float, 4> initial_state;
    SsdSet set = {};
};

// The gradients of sum(grad_y * y) + sum(grad_final_state * final_state); grad_final_state may be absent. T
// is f32, on a GPU bf16 too. No gradient may alias an input or grad_y.
template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  const SsdOptions& options = {});

// One token of each of s sequences: rows of `in` are sequences; in.cu_seqlens and in.initial_state are
// ignored. `state` [s h p n], with slots [any h p n], is advanced in place: S is f32, on a GPU bf16 too (sums
// are f32 all the same, and y is of the sums before they are rounded).
template <class T, class S>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<S, 4> state, View<T, 3> y);

}  // namespace ssm
