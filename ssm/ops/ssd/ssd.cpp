#include "ssm/ops/ssd/ssd.h"

#include "ssm/ops/ssd/ssd_impl.h"

namespace ssm {
namespace {

struct Sizes {
    int64_t t, h, p, g, n;
};

// Everything but cu_seqlens and states, which ssd_step ignores.
template <class T>
Sizes check_inputs(std::string_view op, const Exec& ex, const SsdInputs<T>& in) {
    require_device(op, ex);
    require(static_cast<bool>(in.x) || in.x.shape[0] == 0, op, "`x` is absent");
    require(static_cast<bool>(in.B) || in.B.shape[0] == 0, op, "`B` is absent");
    const Sizes z{in.x.shape[0], in.x.shape[1], in.x.shape[2], in.B.shape[1], in.B.shape[2]};
    require(z.h > 0 && z.p > 0, op, "`x` must be [t h p] with h, p > 0 but is {}", in.x.shape_string());
    require(z.g > 0 && z.n > 0, op, "`B` must be [t g n] with g, n > 0 but is {}", in.B.shape_string());
    require(z.h % z.g == 0, op, "the number of groups g = {} does not divide the number of heads h = {}", z.g,
            z.h);
    if (z.t > 0) {
        require_shape(op, "dt", "t h", in.dt, {z.t, z.h});
        require_shape(op, "B", "t g n", in.B, {z.t, z.g, z.n});
        require_shape(op, "C", "t g n", in.C, {z.t, z.g, z.n});
    }
    require_shape(op, "A", "h", in.A, {z.h});
    if (in.D && in.D.shape[1] != 1) require_shape(op, "D", "h p", in.D, {z.h, z.p});
    if (in.D && in.D.shape[1] == 1) require_shape(op, "D", "h 1", in.D, {z.h, 1});
    require_shape_if(op, "dt_bias", "h", in.dt_bias, {z.h});
    require(in.dt_min <= in.dt_max, op, "dt_min = {} is above dt_max = {}", in.dt_min, in.dt_max);
    return z;
}

template <class T>
int64_t check_sequences(std::string_view op, const SsdInputs<T>& in, const Sizes& z, int64_t chunk) {
    require(chunk > 0, op, "`chunk` must be positive but is {}", chunk);
    require_cu_seqlens(op, in.cu_seqlens, z.t);
    const int64_t s = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    require_shape_if(op, "initial_state", "s h p n", in.initial_state, {s, z.h, z.p, z.n});
    return s;
}

}  // namespace

int64_t ssd_chunks(CuSeqlens cu_seqlens, int64_t chunk) {
    require(chunk > 0, "ssd", "`chunk` must be positive but is {}", chunk);
    int64_t count = 0;
    for (size_t s = 1; s < cu_seqlens.size(); ++s) {
        count += (cu_seqlens[s] - cu_seqlens[s - 1] + chunk - 1) / chunk;
    }
    return count;
}

template <class T>
void ssd(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
         View<float, 4> chunk_states, const SsdOptions& options) {
    const Sizes z = check_inputs("ssd", ex, in);
    const int64_t s = check_sequences("ssd", in, z, options.chunk);
    if (z.t > 0) require_shape("ssd", "y", "t h p", y, {z.t, z.h, z.p});
    require_shape_if("ssd", "final_state", "s h p n", final_state, {s, z.h, z.p, z.n});
    require_shape_if("ssd", "chunk_states", "chunks h p n", chunk_states,
                     {ssd_chunks(in.cu_seqlens, options.chunk), z.h, z.p, z.n});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::ssd<T>(ex, in, y, final_state, chunk_states, options.chunk);
    }
    cpu::ssd<T>(ex, in, y, final_state, chunk_states, options.chunk);
}

template <class T>
void ssd_backward(const Exec& ex, const SsdInputs<T>& in, View<const float, 4> chunk_states,
                  View<const T, 3> grad_y, View<const float, 4> grad_final_state, const SsdGradients<T>& grad,
                  const SsdOptions& options) {
    constexpr std::string_view op = "ssd_backward";
    const Sizes z = check_inputs(op, ex, in);
    const int64_t s = check_sequences(op, in, z, options.chunk);
    if (z.t > 0) {
        require_shape(op, "chunk_states", "chunks h p n", chunk_states,
                      {ssd_chunks(in.cu_seqlens, options.chunk), z.h, z.p, z.n});
        require_shape(op, "grad_y", "t h p", grad_y, {z.t, z.h, z.p});
    }
    require_shape_if(op, "grad_final_state", "s h p n", grad_final_state, {s, z.h, z.p, z.n});
    require_shape_if(op, "grad.x", "t h p", grad.x, {z.t, z.h, z.p});
    require_shape_if(op, "grad.dt", "t h", grad.dt, {z.t, z.h});
    require_shape_if(op, "grad.A", "h", grad.A, {z.h});
    require_shape_if(op, "grad.B", "t g n", grad.B, {z.t, z.g, z.n});
    require_shape_if(op, "grad.C", "t g n", grad.C, {z.t, z.g, z.n});
    if (grad.D) {
        require(static_cast<bool>(in.D), op, "`grad.D` is given but `D` is absent");
        require_shape(op, "grad.D", in.D.shape[1] == 1 ? "h 1" : "h p", grad.D, in.D.shape);
    }
    if (grad.dt_bias) {
        require(static_cast<bool>(in.dt_bias), op, "`grad.dt_bias` is given but `dt_bias` is absent");
        require_shape(op, "grad.dt_bias", "h", grad.dt_bias, {z.h});
    }
    require_shape_if(op, "grad.initial_state", "s h p n", grad.initial_state, {s, z.h, z.p, z.n});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda)
            return cuda::ssd_backward<T>(ex, in, chunk_states, grad_y, grad_final_state, grad, options.chunk);
    }
    if constexpr (std::is_same_v<T, float>) {
        cpu::ssd_backward<T>(ex, in, chunk_states, grad_y, grad_final_state, grad, options.chunk);
    } else {
        fail(ErrorCode::unsupported, op, "gradients of bf16 activations need a GPU");
    }
}

template <class T, class S>
void ssd_step(const Exec& ex, const SsdInputs<T>& in, View<S, 4> state, View<T, 3> y) {
    const Sizes z = check_inputs("ssd_step", ex, in);
    if (z.t == 0) return;
    const int64_t states = in.slots ? state.shape[0] : z.t;
    require_shape("ssd_step", "state", "s h p n", state, {states, z.h, z.p, z.n});
    require_slots("ssd_step", ex.device == Device::cpu, in.slots, z.t, states);
    require_shape("ssd_step", "y", "s h p", y, {z.t, z.h, z.p});
    if constexpr (kHasCuda) {
        if (ex.device == Device::cuda) return cuda::ssd_step(ex, in, state, y);
    }
    if constexpr (std::is_same_v<S, float>) {
        cpu::ssd_step<T>(ex, in, state, y);
    } else {
        fail(ErrorCode::unsupported, "ssd_step", "bf16 states need a GPU");
    }
}

template void ssd<float>(const Exec&, const SsdInputs<float>&, View<float, 3>, View<float, 4>, View<float, 4>,
                         const SsdOptions&);
template void ssd<bf16>(const Exec&, const SsdInputs<bf16>&, View<bf16, 3>, View<float, 4>, View<float, 4>,
                        const SsdOptions&);
template void ssd_backward<float>(const Exec&, const SsdInputs<float>&, View<const float, 4>,
                                  View<const float, 3>, View<const float, 4>, const SsdGradients<float>&,
                                  const SsdOptions&);
template void ssd_backward<bf16>(const Exec&, const SsdInputs<bf16>&, View<const float, 4>,
                                 View<const bf16, 3>, View<const float, 4>, const SsdGradients<bf16>&,
                                 const SsdOptions&);
template void ssd_step(const Exec&, const SsdInputs<float>&, View<float, 4>, View<float, 3>);
template void ssd_step(const Exec&, const SsdInputs<bf16>&, View<float, 4>, View<bf16, 3>);
template void ssd_step(const Exec&, const SsdInputs<float>&, View<bf16, 4>, View<float, 3>);
template void ssd_step(const Exec&, const SsdInputs<bf16>&, View<bf16, 4>, View<bf16, 3>);

}  // namespace ssm
