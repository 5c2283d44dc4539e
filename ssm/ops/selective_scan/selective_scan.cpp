#include "ssm/ops/selective_scan/selective_scan.h"

#include "ssm/core/dtype.h"

#include "ssm/ops/selective_scan/selective_scan_impl.h"

namespace ssm {
namespace {

constexpr std::string_view kOp = "selective_scan";

// Shapes shared by the sequence, its gradient and the step; t is the number of rows.
template <class T>
void check_inputs(const Exec& ex, const SelectiveScanInputs<T>& in) {
    require_device(kOp, ex);
    require(static_cast<bool>(in.u), kOp, "`u` must be [t d] but is absent");
    require(static_cast<bool>(in.A), kOp, "`A` must be [d n] but is absent");
    const int64_t t = in.u.shape[0], d = in.u.shape[1], n = in.A.shape[1];
    require(n >= 1, kOp, "`A` must be [d n] with n >= 1 but is {}", in.A.shape_string());
    require_shape(kOp, "A", "d n", in.A, {d, n});
    require_shape(kOp, "delta", "t d", in.delta, {t, d});
    require_shape(kOp, "B", "t n", in.B, {t, n});
    require_shape(kOp, "C", "t n", in.C, {t, n});
    require_shape_if(kOp, "D", "d", in.D, {d});
    require_shape_if(kOp, "z", "t d", in.z, {t, d});
    require_shape_if(kOp, "delta_bias", "d", in.delta_bias, {d});
}

template <class T>
int64_t check_sequences(const SelectiveScanInputs<T>& in) {
    require_cu_seqlens(kOp, in.cu_seqlens, in.u.shape[0]);
    const int64_t s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    require_shape_if(kOp, "initial_state", "s d n", in.initial_state, {s, in.u.shape[1], in.A.shape[1]});
    return s;
}

template <class T>
void check_gradients(const SelectiveScanInputs<T>& in, const SelectiveScanGradients<T>& grad, int64_t s) {
    const int64_t t = in.u.shape[0], d = in.u.shape[1], n = in.A.shape[1];
    require_shape_if(kOp, "grad.u", "t d", grad.u, {t, d});
    require_shape_if(kOp, "grad.delta", "t d", grad.delta, {t, d});
    require_shape_if(kOp, "grad.A", "d n", grad.A, {d, n});
    require_shape_if(kOp, "grad.B", "t n", grad.B, {t, n});
    require_shape_if(kOp, "grad.C", "t n", grad.C, {t, n});
    require_shape_if(kOp, "grad.D", "d", grad.D, {d});
    require_shape_if(kOp, "grad.z", "t d", grad.z, {t, d});
    require_shape_if(kOp, "grad.delta_bias", "d", grad.delta_bias, {d});
    require_shape_if(kOp, "grad.initial_state", "s d n", grad.initial_state, {s, d, n});
    require(!grad.D || in.D, kOp, "`grad.D` is given but `D` is absent");
    require(!grad.z || in.z, kOp, "`grad.z` is given but `z` is absent");
}

}  // namespace

std::vector<int64_t> selective_scan_first_chunks(CuSeqlens cu_seqlens, int64_t chunk) {
    std::vector<int64_t> first{0};
    first.reserve(cu_seqlens.size());
    for (size_t i = 1; i < cu_seqlens.size(); ++i) {
        const int64_t length = cu_seqlens[i] - cu_seqlens[i - 1];
        first.push_back(first.back() + (length + chunk - 1) / chunk);
    }
    return first;
}

int64_t selective_scan_chunks(CuSeqlens cu_seqlens, int64_t chunk) {
    require(chunk >= 1, kOp, "`chunk` must be at least 1 but is {}", chunk);
    return selective_scan_first_chunks(cu_seqlens, chunk).back();
}

template <class T>
void selective_scan(const Exec& ex, const SelectiveScanInputs<T>& in, View<T, 2> y,
                    View<float, 3> final_state, View<float, 3> chunk_states,
                    const SelectiveScanOptions& options) {
    check_inputs(ex, in);
    const int64_t s = check_sequences(in), d = in.u.shape[1], n = in.A.shape[1];
    const int64_t chunks = selective_scan_chunks(in.cu_seqlens, options.chunk);
    require_shape(kOp, "y", "t d", y, in.u.shape);
    require_shape_if(kOp, "final_state", "s d n", final_state, {s, d, n});
    require_shape_if(kOp, "chunk_states", "chunks d n", chunk_states, {chunks, d, n});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::selective_scan(ex, in, y, final_state, chunk_states, options);
    }
    cpu::selective_scan(ex, in, y, final_state, chunk_states, options);
}

template <class T>
void selective_scan_backward(const Exec& ex, const SelectiveScanInputs<T>& in,
                             View<const float, 3> chunk_states, View<const T, 2> grad_y,
                             View<const float, 3> grad_final_state, const SelectiveScanGradients<T>& grad,
                             const SelectiveScanOptions& options) {
    check_inputs(ex, in);
    const int64_t s = check_sequences(in), d = in.u.shape[1], n = in.A.shape[1];
    const int64_t chunks = selective_scan_chunks(in.cu_seqlens, options.chunk);
    if (chunks > 0) require_shape(kOp, "chunk_states", "chunks d n", chunk_states, {chunks, d, n});
    require_shape(kOp, "grad_y", "t d", grad_y, in.u.shape);
    require_shape_if(kOp, "grad_final_state", "s d n", grad_final_state, {s, d, n});
    check_gradients(in, grad, s);
    require_shape_if(kOp, "y", "t d", grad.y, in.u.shape);
    require(!grad.y || ex.device != Device::cpu, kOp, "only a GPU gives y again");
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::selective_scan_backward(ex, in, chunk_states, grad_y, grad_final_state, grad,
                                                 options);
    }
    if constexpr (std::is_same_v<T, float>) {
        cpu::selective_scan_backward(ex, in, chunk_states, grad_y, grad_final_state, grad, options);
    } else {
        fail(ErrorCode::unsupported, kOp, "gradients of bf16 activations need a GPU");
    }
}

template <class T>
void selective_scan_step(const Exec& ex, const SelectiveScanInputs<T>& in, View<float, 3> state,
                         View<T, 2> y) {
    check_inputs(ex, in);
    const int64_t s = in.u.shape[0], d = in.u.shape[1], n = in.A.shape[1];
    const int64_t states = in.slots ? state.shape[0] : s;
    require_shape(kOp, "state", "s d n", state, {states, d, n});
    require_slots(kOp, ex.device == Device::cpu, in.slots, s, states);
    require_shape(kOp, "y", "s d", y, {s, d});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::selective_scan_step(ex, in, state, y);
    }
    cpu::selective_scan_step(ex, in, state, y);
}

template void selective_scan(const Exec&, const SelectiveScanInputs<float>&, View<float, 2>, View<float, 3>,
                             View<float, 3>, const SelectiveScanOptions&);
template void selective_scan(const Exec&, const SelectiveScanInputs<bf16>&, View<bf16, 2>, View<float, 3>,
                             View<float, 3>, const SelectiveScanOptions&);
template void selective_scan_backward(const Exec&, const SelectiveScanInputs<float>&, View<const float, 3>,
                                      View<const float, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<float>&, const SelectiveScanOptions&);
template void selective_scan_backward(const Exec&, const SelectiveScanInputs<bf16>&, View<const float, 3>,
                                      View<const bf16, 2>, View<const float, 3>,
                                      const SelectiveScanGradients<bf16>&, const SelectiveScanOptions&);
template void selective_scan_step(const Exec&, const SelectiveScanInputs<float>&, View<float, 3>,
                                  View<float, 2>);
template void selective_scan_step(const Exec&, const SelectiveScanInputs<bf16>&, View<float, 3>,
                                  View<bf16, 2>);

}  // namespace ssm
