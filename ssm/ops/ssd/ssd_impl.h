// What a backend of ssd must provide. Arguments were checked by ssd.cpp. Private.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ssm/ops/ssd/ssd.h"

namespace ssm::ssd_detail {

// Tokens begin .. begin + length of sequence `sequence`.
struct Chunk {
    int64_t begin, length, sequence;
};

// The chunks of all sequences in order, and the first chunk of each sequence: those of sequence s are
// first[s] .. first[s + 1].
struct ChunkList {
    std::vector<Chunk> chunks;
    std::vector<int64_t> first;
    int64_t longest = 0;
};

inline ChunkList make_chunks(CuSeqlens cu_seqlens, int64_t q) {
    ChunkList list;
    const int64_t sequences = static_cast<int64_t>(cu_seqlens.size()) - 1;
    for (int64_t s = 0; s < sequences; ++s) {
        list.first.push_back(static_cast<int64_t>(list.chunks.size()));
        for (int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t += q) {
            const int64_t length = std::min(q, cu_seqlens[s + 1] - t);
            list.chunks.push_back({t, length, s});
            list.longest = std::max(list.longest, length);
        }
    }
    list.first.push_back(static_cast<int64_t>(list.chunks.size()));
    return list;
}

}  // namespace ssm::ssd_detail

// T = float alone goes backward on the CPU.
namespace ssm::cpu {

template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, int64_t chunk);
template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  int64_t chunk);
template <class T>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<float, 4> state, View<T, 3> y);

}  // namespace ssm::cpu

namespace ssm::cuda {

template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, int64_t chunk);
template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  int64_t chunk);
template <class T, class S>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<S, 4> state, View<T, 3> y);

}  // namespace ssm::cuda
