// What a device must provide for the selective scan. Private: the front has checked every argument.
#pragma once

#include <vector>

#include "ssm/core/dtype.h"

#include "ssm/ops/selective_scan/selective_scan.h"

namespace ssm {

// first[i] is the index of sequence i's first chunk; first[s] the number of chunks.
std::vector<int64_t> selective_scan_first_chunks(CuSeqlens cu_seqlens, int64_t chunk);

// T = float alone goes backward on the CPU.
namespace cpu {

template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options);

template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const T, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
                             const SelectiveScanOptions& options);

template <class T>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state,
                         View<T, 2> y);

}  // namespace cpu

namespace cuda {

template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options);

template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const T, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
                             const SelectiveScanOptions& options);

template <class T>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state,
                         View<T, 2> y);

}  // namespace cuda
}  // namespace ssm
