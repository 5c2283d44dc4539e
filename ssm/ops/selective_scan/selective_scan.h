// Selective scan (S6): a linear recurrence with diagonal, input-dependent decay, discretised, read out,
// skipped and gated in one pass.
//
//   dt[t,d]  = delta[t,d] + delta_bias[d],  then softplus if `delta_softplus`
//   h[t,d,n] = exp(dt[t,d] A[d,n]) h[t-1,d,n] + dt[t,d] B[t,n] u[t,d]        h[-1] = initial_state or 0
//   y[t,d]   = (sum_n C[t,n] h[t,d,n] + D[d] u[t,d]) silu(z[t,d])            D, z optional
//
// Source     Gu & Dao 2023 (Mamba), algorithm 2; B discretised by Euler's rule as in their code.
// Shapes     u, delta, z, y: [t d] of T (f32 or bf16)   A: [d n] f32 (negative)   B, C: [t n] f32
//            D, delta_bias: [d] f32   cu_seqlens: [s+1]   initial_state, final_state: [s d n] f32
//            Rows may be strided (slices of a projection). `y` may alias `u` or `z`, not the rest.
// Numerics   state and sums in f32; rel. L2 error vs f64 <= 1e-5 (f32), 1e-2 (bf16 activations).
// Cost       per token and channel: n exp, 5n + 12 FLOP; 4 T-sized numbers streamed. Bound by exp, not by
//            memory: the state stays in registers and is never written per token.
// GPU        n <= 64 (the step: any n). Deterministic always. In bf16 y, grad B and grad C sum terms of ten
//            bits. A split in time takes decays below 2^-24 (bf16: 2^-16) for zero. Scratch of the backward
//            pass: 2 t n d / 32 of T (n > 16: / 8); it makes states again unless `chunk` is 32.
#pragma once

#include "ssm/core/exec.h"
#include "ssm/core/view.h"
#include "ssm/ops/sequences.h"

namespace ssm {

template <class T>
struct SelectiveScanInputs {
    View<const T, 2> u;                  // [t d]
    View<const T, 2> delta;              // [t d]
    View<const float, 2> A;              // [d n]
    View<const float, 2> B;              // [t n]
    View<const float, 2> C;              // [t n]
    View<const float, 1> D;              // [d] or absent
    View<const T, 2> z;                  // [t d] or absent
    View<const float, 1> delta_bias;     // [d] or absent
    CuSeqlens cu_seqlens;                // [s+1]
    View<const float, 3> initial_state;  // [s d n] or absent (zero)
    bool delta_softplus = true;
    Slots slots = {};  // the step: [s], rows of `state`, or absent
};

struct SelectiveScanOptions {
    // Tokens between two saved states of the backward pass, and the piece of the scan that is parallel over
    // time. 32: a chunk's states stay in L2, and those saved take half the memory of `u` in f32 at n = 16.
    int64_t chunk = 32;
    // Split a sequence over threads in time, with the operator (a1,b1) o (a2,b2) = (a1 a2, a2 b1 + b2),
    // instead of only over sequences and channels. That costs every exponential twice, and rounds
    // differently. `automatic`: when the threads are more than twice the pairs of a sequence and a block of
    // 16 channels. With `never` and `always` the result does not depend on the number of threads.
    enum class TimeParallel { automatic, never, always } time_parallel = TimeParallel::automatic;
};

// Number of saved states: sum over the sequences of ceil(length / chunk).
int64_t selective_scan_chunks(CuSeqlens cu_seqlens, int64_t chunk);

// y and, where present, final_state [s d n] and chunk_states [chunks d n] (the state entering each chunk, in
// the order of the sequences; what the backward pass needs).
template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options = {});

// Which gradients are written instead of added to.
struct SelectiveScanSet {
    bool u = false, delta = false, B = false, C = false, z = false;
};

// Gradients: of u, delta and z of their type, the others f32. Added to unless `set` says otherwise (bf16 is
// added in f32 and rounded); absent ones are not computed.
template <class T>
struct SelectiveScanGradients {
    View<T, 2> u, delta;  // shapes of the inputs
    View<float, 2> A, B, C;
    View<float, 1> D;
    View<T, 2> z;
    View<float, 1> delta_bias;
    View<float, 3> initial_state;
    SelectiveScanSet set = {};
    View<T, 2> y = {};  // on a GPU: y once more, written; it may lie where grad_y does
};

// The gradients of sum(grad_y * y) + sum(grad_final_state * final_state); grad_final_state may be absent.
// The states inside a chunk are recomputed from chunk_states. The result does not depend on timing. T is f32,
// on a GPU bf16 too. No gradient may alias an input or grad_y. y differs from the
// forward pass's by the rounding of its sums.
template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const T, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
                             const SelectiveScanOptions& options = {});

// One token of each of s sequences: rows of `in` are sequences ([s d], [s n]); in.cu_seqlens and
// in.initial_state are ignored. `state` [s d n], with slots [any d n], is advanced in place.
template <class T>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state,
                         View<T, 2> y);

}  // namespace ssm
