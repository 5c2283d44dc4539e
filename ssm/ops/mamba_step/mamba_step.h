// What a Mamba-1 layer does with one token of each of t sequences between its projections: step sizes from
// their low rank, the selective scan's step, the gate.
//
//   [delta; B; C] = dbc, each divided by its root mean square if `norm_eps` (FalconMamba)
//   dt = softplus(W_dt delta + dt_bias)          h = exp(dt A) h + dt B x
//   y  = (C h + D x) silu(z)
//
// Source     Gu & Dao 2023, algorithm 2; FalconMamba: Zuo et al. 2024.
// Shapes     x, z, y: [t d] of T (f32 or bf16)   dbc: [t r+2n] f32   dt_weight: [d r] f32 or bf16
//            dt_bias, D: [d] f32 or absent   A: [d n] f32   state: [t d n] f32, on a GPU bf16 too, with
//            slots [any d n].
//            Rows may be strided. `y` may be `x` or `z`.
// Numerics   f32 (y is of h before a bf16 state rounds it); where the operators run one after another the
//            low rank is rounded to a bf16 dt_weight's type, and W_dt delta to x's.
//
// Cost       8 t d n bytes of state (bf16: 4) and d r of dt_weight: bandwidth bound; t n d exponentials.
//
// GPU        one kernel; else selective_scan_step after linear. dt_weight, A, D, dt_bias must not have been
//            written by the kernel before.
#pragma once

#include <optional>

#include "ssm/ops/linear/linear.h"
#include "ssm/ops/sequences.h"

namespace ssm {

struct MambaStepInputs {
    Tensor x = {}, dbc = {}, z = {};
    PackedWeight dt_weight = {};        // [d r]
    View<const float, 1> dt_bias = {};  // [d] or absent
    View<const float, 2> A = {};        // [d n], negative
    View<const float, 1> D = {};        // [d] or absent
    std::optional<float> norm_eps = {};
    Slots slots = {};  // [t], rows of `state`, or absent
    Tensor next = {};  // a weight that will be read next, or absent: a GPU brings it to L2 meanwhile (t > 4)
};

void mamba_step(const Exec& ex, const MambaStepInputs& in, const Tensor& state, const Tensor& y);

}  // namespace ssm
