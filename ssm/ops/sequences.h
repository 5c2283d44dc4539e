// Packed sequences, the one layout of every sequence operator.
//
// Tokens of all sequences lie one after another: x is [t d] with t = the sum of the lengths. `cu_seqlens`
// [s+1] holds the cumulative lengths, from 0 to t: sequence i owns tokens cu_seqlens[i] .. cu_seqlens[i+1].
// A batch [b l] is the packing 0, l, 2l, ...; nothing ever flows from one sequence into the next.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "ssm/core/error.h"
#include "ssm/core/view.h"

namespace ssm {

using CuSeqlens = std::span<const int64_t>;

// Throws unless cu_seqlens starts at 0, never decreases and ends at t.
inline void require_cu_seqlens(std::string_view op, CuSeqlens cu_seqlens, int64_t t) {
    require(cu_seqlens.size() >= 2, op, "`cu_seqlens` needs at least 2 entries but has {}",
            cu_seqlens.size());
    require(cu_seqlens.front() == 0, op, "`cu_seqlens` must start at 0 but starts at {}", cu_seqlens.front());
    for (size_t i = 1; i < cu_seqlens.size(); ++i) {
        require(cu_seqlens[i - 1] <= cu_seqlens[i], op, "`cu_seqlens` decreases at {}: {} after {}", i,
                cu_seqlens[i], cu_seqlens[i - 1]);
    }
    require(cu_seqlens.back() == t, op, "`cu_seqlens` must end at t = {} but ends at {}", t,
            cu_seqlens.back());
}

// States of sequences that come and go lie in slots: sequence s of a step has the state in row slots[s] of a
// pool; without slots in row s.
using Slots = View<const int32_t, 1>;

inline int64_t slot_of(const Slots& slots, int64_t s) { return slots ? slots(s) : s; }

// Of a step's front: `slots` [s] into a pool of `count` states, or absent and one state for each sequence. On
// a GPU only the device can read them.
inline void require_slots(std::string_view op, bool on_host, const Slots& slots, int64_t s, int64_t count) {
    if (!slots) return;
    require_shape(op, "slots", "s", slots, {s});
    for (int64_t i = 0; on_host && i < s; ++i) {
        require(slots(i) >= 0 && slots(i) < count, op, "slots[{}] = {} is outside the pool [0, {})", i,
                slots(i), count);
    }
}

}  // namespace ssm
