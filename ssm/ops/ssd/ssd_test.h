// Shapes for the tests and calls of ssd and ssd_backward: outputs start as NaN, gradients at kGradientStart.
#pragma once

#include <gtest/gtest.h>

#include "ssm/ops/ssd/ssd.h"
#include "ssm/ops/ssd/ssd_reference.h"
#include "tests/support/compare.h"
#include "tests/support/gradcheck.h"

namespace ssm::test {

inline std::vector<SsdCase> ssd_shapes() {
    return {
        {.h = 2, .p = 3, .g = 1, .n = 4, .padding = 5},
        {.h = 6, .p = 8, .g = 2, .n = 16},
        {.h = 3, .p = 17, .g = 3, .n = 33, .initial_state = false, .D_width = 17, .padding = 1},
        {.h = 2, .p = 64, .g = 1, .n = 128, .dt_bias = false, .dt_softplus = false, .D_width = 0},
        {.h = 4, .p = 1, .g = 2, .n = 1, .dt_min = 0.2f, .dt_max = 0.9f, .padding = 3},
        {.h = 1, .p = 65, .g = 1, .n = 15},
        {.h = 2, .p = 9, .g = 1, .n = 256, .padding = 8},
    };
}

template <class T>
struct Outputs {
    std::vector<T> y;
    std::vector<float> final_state, chunk_states;
};

inline int64_t state_size(const SsdCase& c) { return c.h * c.p * c.n; }

template <class T>
Outputs<T> run(const SsdCase& c, SsdInputs<T> in, int64_t chunk, int threads = 2) {
    const Exec ex = make_cpu_exec(threads);
    StridedRows<T> y(c.t(), c.h * c.p, c.padding);
    const int64_t chunks = ssd_chunks(c.cu_seqlens, chunk);
    Outputs<T> o{{}, nan_vector(c.s() * state_size(c)), nan_vector(chunks * state_size(c))};
    ssd<T>(ex, in, y.template view<T, 3>({c.t(), c.h, c.p}),
           View<float, 4>(o.final_state.data(), {c.s(), c.h, c.p, c.n}),
           View<float, 4>(o.chunk_states.data(), {chunks, c.h, c.p, c.n}), {.chunk = chunk});
    EXPECT_TRUE(y.padding_intact());
    o.y = y.dense();
    return o;
}

struct Gradients {
    std::vector<float> x, dt, A, B, C, D, dt_bias, initial_state;
};

// Gradients of sum(grad_y y) + sum(grad_final_state final_state), in buffers that start at kGradientStart,
// which is subtracted from all.
inline Gradients run_backward(const SsdCase& c, SsdInputs<float> in, const std::vector<float>& chunk_states,
                              const std::vector<float>& grad_y, const std::vector<float>& grad_final_state,
                              int64_t chunk, int threads = 2, SsdSet set = {}) {
    const Exec ex = make_cpu_exec(threads);
    const auto start = [](int64_t count) { return std::vector<float>(count, kGradientStart); };
    Gradients g{start(c.t() * c.h * c.p), start(c.t() * c.h),     start(c.h), start(c.t() * c.g * c.n),
                start(c.t() * c.g * c.n), start(c.h * c.D_width), start(c.h), start(c.s() * state_size(c))};
    SsdGradients<float> v{.set = set};
    v.x = {g.x.data(), {c.t(), c.h, c.p}};
    v.dt = {g.dt.data(), {c.t(), c.h}};
    v.A = {g.A.data(), {c.h}};
    v.B = {g.B.data(), {c.t(), c.g, c.n}};
    v.C = {g.C.data(), {c.t(), c.g, c.n}};
    if (c.D_width > 0) v.D = {g.D.data(), {c.h, c.D_width}};
    if (c.dt_bias) v.dt_bias = {g.dt_bias.data(), {c.h}};
    v.initial_state = {g.initial_state.data(), {c.s(), c.h, c.p, c.n}};
    View<const float, 4> grad_final;
    if (!grad_final_state.empty()) grad_final = {grad_final_state.data(), {c.s(), c.h, c.p, c.n}};
    ssd_backward<float>(
        ex, in, View<const float, 4>(chunk_states.data(), {ssd_chunks(c.cu_seqlens, chunk), c.h, c.p, c.n}),
        View<const float, 3>(grad_y.data(), {c.t(), c.h, c.p}), grad_final, v, {.chunk = chunk});
    for (std::vector<float>* f : {&g.x, &g.dt, &g.A, &g.B, &g.C, &g.D, &g.dt_bias, &g.initial_state}) {
        *f = added(std::move(*f));
    }
    return g;
}

}  // namespace ssm::test
