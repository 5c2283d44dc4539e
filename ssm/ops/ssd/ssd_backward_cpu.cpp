// SSD backward on the CPU. README.md derives the equations; the names are the same.
//
// 1 per chunk and group: pack B and C, G = C B^T                     threads over chunks and groups
// 2 the gradient of the state leaving each chunk, last chunk first   threads over sequences and heads
// 3 the rest is local to a chunk: the heads of a group in order,     threads over chunks and groups
//   their shares of grad B and grad C summed in place
// 4 grad A, D, dt_bias: partial sums of chunks, added in order       one thread
// So the sums have a fixed order, whatever the number of threads.
#include "ssm/core/parallel.h"
#include "ssm/ops/ssd/ssd_impl.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/ssd/ssd_backward_cpu.cpp"  // NOLINT
#include <hwy/foreach_target.h>                                // NOLINT
#include <hwy/highway.h>

#include "ssm/ops/ssd/ssd_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using ssd_detail::Chunk;
using ssd_detail::ChunkList;

constexpr float kOne = 1.0f;

// Scratch of one worker. Strides: scratch_stride of the last dimension.
struct GradScratch {
    TimeSteps steps;
    float *slope, *grad_dt, *grad_l;            // [q]: d dt / d raw, gradients of dt and of l
    float *x, *X, *X_to_end, *grad_y, *grad_X;  // [q p]
    float* Xt;                                  // [p q]
    float* M;                                   // [q q] first the gradient of M, then M
    float* grad_G;                              // [q q] sum over the heads
    float *U, *grad_C, *grad_B;                 // [q n]
    float *S, *grad_S_next;                     // [p n]
    float* grad_St;                             // [n p]
};

// With memory == nullptr only counts: returns the floats needed.
int64_t place_grad_scratch(float* memory, int64_t q, int64_t p, int64_t n, GradScratch& s) {
    int64_t used = 0;
    const auto take = [&](int64_t rows, int64_t columns) {
        float* const at = memory == nullptr ? nullptr : memory + used;
        used += rows * scratch_stride(columns);
        return at;
    };
    float* const steps = memory;
    used += time_steps_floats(q);
    if (memory != nullptr) s.steps = place_time_steps(steps, q);
    for (float** v : {&s.slope, &s.grad_dt, &s.grad_l}) *v = take(1, q);
    for (float** v : {&s.x, &s.X, &s.X_to_end, &s.grad_y, &s.grad_X}) *v = take(q, p);
    s.Xt = take(p, q);
    for (float** v : {&s.M, &s.grad_G}) *v = take(q, q);
    for (float** v : {&s.U, &s.grad_C, &s.grad_B}) *v = take(q, n);
    for (float** v : {&s.S, &s.grad_S_next}) *v = take(p, n);
    s.grad_St = take(n, p);
    return used;
}

struct Backward {
    const Exec& ex;
    const SsdInputs<float>& in;
    View<const float, 4> chunk_states;
    View<const float, 3> grad_y;
    View<const float, 4> grad_final_state;
    const SsdGradients<float>& grad;
    ChunkList list;
    int64_t h, p, g, n, q;  // q: the longest chunk
    float* shared;          // [chunks g] of GroupChunk
    float* grad_states;     // [chunks h p stride_n]: of the state leaving the chunk
    float* partial;         // [chunks h 2 + p]: grad A, grad dt_bias, grad D
    float* scratch;
    int64_t scratch_size, workers;

    int64_t stride_n() const { return scratch_stride(n); }
    int64_t stride_p() const { return scratch_stride(p); }
    int64_t stride_q() const { return scratch_stride(q); }
    float* grad_state(int64_t c, int64_t head) const { return grad_states + (c * h + head) * p * stride_n(); }
    float* partials(int64_t c, int64_t head) const { return partial + (c * h + head) * (2 + p); }
    GroupChunk group_chunk(int64_t c, int64_t group) const {
        return place_group_chunk(shared + (c * g + group) * group_chunk_floats(q, n), q, n);
    }
    bool state_enters(int64_t c) const { return in.initial_state || c > list.first[list.chunks[c].sequence]; }
    bool grad_state_enters(int64_t c) const {
        return grad_final_state || c + 1 < list.first[list.chunks[c].sequence + 1];
    }

    // Phase 2: grad S_prev = exp(l_q) grad S + sum_i exp(l_i) grad y_i C_i^T, from the last chunk of sequence
    // s to the first and into the initial state.
    void grad_states_of(int64_t s, int64_t head, GradScratch& m) const {
        const int64_t size = p * stride_n(), group = head / (h / g);
        const int64_t first = list.first[s], last = list.first[s + 1];
        float* const end = last > first ? grad_state(last - 1, head) : m.grad_S_next;
        std::fill(end, end + size, 0.0f);
        if (grad_final_state) {
            const float* from = grad_final_state.row(s) + head * p * n;
            for (int64_t i = 0; i < p; ++i) pack_row(from + i * n, n, end + i * stride_n());
        }
        for (int64_t c = last - 1; c >= first; --c) {
            if (c == first && !grad.initial_state) return;
            const Chunk& chunk = list.chunks[c];
            float* const out = c > first ? grad_state(c - 1, head) : m.grad_S_next;
            std::copy(grad_state(c, head), grad_state(c, head) + size, out);
            load_time_steps(in, chunk, head, m.steps);
            for (int64_t i = 0; i < chunk.length; ++i) {
                float* const row = m.grad_y + i * stride_p();
                pack_row(grad_y.row(chunk.begin + i) + head * p, p, row);
                scale_row(m.steps.from_start[i], row, p);
            }
            multiply({.a = m.grad_y,
                      .a_row = 1,
                      .a_k = stride_p(),
                      .panel = group_chunk(c, group).C,
                      .panel_stride = stride_n(),
                      .out = out,
                      .out_stride = stride_n(),
                      .rows = p,
                      .columns = n,
                      .depth = chunk.length,
                      .beta = &m.steps.total});
        }
        if (!grad.initial_state) return;
        float* const to = grad.initial_state.row(s) + head * p * n;
        for (int64_t i = 0; i < p; ++i) add_row(m.grad_S_next + i * stride_n(), n, to + i * n);
    }

    static void scale_row(float factor, float* row, int64_t count) {
        const FloatVec f = hn::Set(FloatTag(), factor);
        for (int64_t j = 0; j < count; j += float_lanes())
            store_floats(hn::Mul(f, load_floats(row + j)), row + j);
    }

    // The operands of one head in chunk c.
    void load_head(int64_t c, int64_t head, GradScratch& m) const {
        const Chunk& chunk = list.chunks[c];
        const FloatTag d;
        load_time_steps(in, chunk, head, m.steps);
        for (int64_t i = 0; i < chunk.length; i += float_lanes()) {
            const FloatVec raw = load_floats(m.steps.raw + i);
            FloatVec slope = hn::Set(d, 1.0f);
            if (in.dt_softplus) {
                const FloatVec dt = Softplus(d, raw);
                const auto inside =
                    hn::And(hn::Ge(dt, hn::Set(d, in.dt_min)), hn::Le(dt, hn::Set(d, in.dt_max)));
                slope = hn::IfThenElseZero(inside, Sigmoid(d, raw));
            }
            store_floats(slope, m.slope + i);
        }
        for (int64_t i = 0; i < chunk.length; ++i) {
            const int64_t at = i * stride_p();
            pack_row(in.x.row(chunk.begin + i) + head * p, p, m.x + at);
            pack_row(grad_y.row(chunk.begin + i) + head * p, p, m.grad_y + at);
            const FloatVec dt = hn::Set(d, m.steps.dt[i]), to_end = hn::Set(d, m.steps.to_end[i]);
            for (int64_t j = 0; j < p; j += float_lanes()) {
                const FloatVec v = hn::Mul(load_floats(m.x + at + j), dt);
                store_floats(v, m.X + at + j);
                store_floats(hn::Mul(v, to_end), m.X_to_end + at + j);
            }
        }
        transpose(m.X, stride_p(), chunk.length, p, m.Xt, stride_q());
        zero_padding(m.Xt, stride_q(), p, chunk.length);
    }

    // grad M = grad Y X^T; grad G += L grad M; row sums of grad M * M into grad_l; M.
    void grad_within(const GroupChunk& k, int64_t length, GradScratch& m) const {
        const int64_t ld = stride_q();
        multiply({.a = m.grad_y,
                  .a_row = stride_p(),
                  .a_k = 1,
                  .panel = m.Xt,
                  .panel_stride = ld,
                  .out = m.M,
                  .out_stride = ld,
                  .rows = length,
                  .columns = length,
                  .depth = p},
                 Triangle::out_lower);
        const FloatTag d;
        FloatVec sum = hn::Zero(d);
        float *const M = m.M, *const grad_G = m.grad_G, *const grad_l = m.grad_l;
        const float* const G = k.G;
        for_each_decay(
            m.steps, length,
            [&](int64_t i, int64_t j, FloatVec L) HWY_ATTR {
                const int64_t at = i * ld + j;
                const FloatVec g_ij = load_floats(G + at), v = hn::Mul(L, load_floats(M + at));
                store_floats(hn::Add(v, load_floats(grad_G + at)), grad_G + at);
                store_floats(hn::Mul(L, g_ij), M + at);
                sum = hn::MulAdd(v, g_ij, sum);
            },
            [&](int64_t i) HWY_ATTR {
                grad_l[i] = hn::GetLane(hn::SumOfLanes(d, sum));
                sum = hn::Zero(d);
            });
    }

    // grad X = exp(l_q - l) (B grad S^T) + M^T grad Y. Returns what exp(l_q) receives as exponent: the
    // gradient of l_q through the state leaving the chunk.
    float grad_inputs(int64_t c, int64_t head, const GroupChunk& k, GradScratch& m) const {
        const int64_t length = list.chunks[c].length, ld = stride_p();
        const bool leaving = grad_state_enters(c);
        double grad_l_end = 0;
        if (leaving) {
            transpose(grad_state(c, head), stride_n(), p, n, m.grad_St, ld);
            zero_padding(m.grad_St, ld, n, p);
            multiply({.a = k.B,
                      .a_row = stride_n(),
                      .a_k = 1,
                      .panel = m.grad_St,
                      .panel_stride = ld,
                      .out = m.grad_X,
                      .out_stride = ld,
                      .rows = length,
                      .columns = p,
                      .depth = n});
            for (int64_t i = 0; i < length; ++i) {
                grad_l_end += static_cast<double>(dot(m.X_to_end + i * ld, m.grad_X + i * ld, padded(p)));
            }
            multiply({.a = m.X_to_end,
                      .a_row = ld,
                      .a_k = 1,
                      .panel = grad_state(c, head),
                      .panel_stride = stride_n(),
                      .out = m.grad_B,
                      .out_stride = stride_n(),
                      .rows = length,
                      .columns = n,
                      .depth = p,
                      .beta = &kOne});
        }
        multiply({.a = m.M,
                  .a_row = 1,
                  .a_k = stride_q(),
                  .panel = m.grad_y,
                  .panel_stride = ld,
                  .out = m.grad_X,
                  .out_stride = ld,
                  .rows = length,
                  .columns = p,
                  .depth = length,
                  .beta = leaving ? m.steps.to_end : nullptr,
                  .beta_stride = 1},
                 Triangle::upper);
        return static_cast<float>(grad_l_end);
    }

    // The state entering the chunk: grad C += exp(l) (grad Y S_prev), its share of grad l; returns that of
    // l_q.
    float grad_entering(int64_t c, int64_t head, const GroupChunk& k, GradScratch& m) const {
        if (!state_enters(c)) return 0.0f;
        const int64_t length = list.chunks[c].length, ld = stride_n();
        const float* const S = chunk_states.row(c) + head * p * n;
        for (int64_t i = 0; i < p; ++i) pack_row(S + i * n, n, m.S + i * ld);
        multiply({.a = m.grad_y,
                  .a_row = stride_p(),
                  .a_k = 1,
                  .panel = m.S,
                  .panel_stride = ld,
                  .out = m.U,
                  .out_stride = ld,
                  .rows = length,
                  .columns = n,
                  .depth = p});
        const FloatTag d;
        for (int64_t i = 0; i < length; ++i) {
            const FloatVec e = hn::Set(d, m.steps.from_start[i]);
            FloatVec sum = hn::Zero(d);
            for (int64_t j = i * ld; j < i * ld + padded(n); j += float_lanes()) {
                const FloatVec u = hn::Mul(e, load_floats(m.U + j));
                sum = hn::MulAdd(u, load_floats(k.C + j), sum);
                store_floats(hn::Add(u, load_floats(m.grad_C + j)), m.grad_C + j);
            }
            m.grad_l[i] += hn::GetLane(hn::SumOfLanes(d, sum));
        }
        if (!grad_state_enters(c)) return 0.0f;
        double product = 0;
        for (int64_t i = 0; i < p; ++i) {
            product += static_cast<double>(dot(m.S + i * ld, grad_state(c, head) + i * ld, padded(n)));
        }
        return m.steps.total * static_cast<float>(product);
    }

    // grad x += dt grad X + D grad y; grad dt = x . grad X, which also leaves grad l; grad D.
    void finish_x(const Chunk& chunk, int64_t head, float* grad_D, GradScratch& m) const {
        const float* D = in.D ? in.D.row(head) : nullptr;
        const bool wide = in.D && in.D.shape[1] > 1;
        for (int64_t i = 0; i < chunk.length; ++i) {
            const int64_t at = i * stride_p();
            const float dt = m.steps.dt[i];
            m.grad_dt[i] = dot(m.x + at, m.grad_X + at, padded(p));
            m.grad_l[i] -= dt * m.grad_dt[i];
            if (grad.D) {
                for (int64_t j = 0; j < p; ++j) grad_D[j] += m.x[at + j] * m.grad_y[at + j];
            }
            if (!grad.x) continue;
            float* const to = grad.x.row(chunk.begin + i) + head * p;
            if (grad.set.x) std::fill(to, to + p, 0.0f);
            const float *const gX = m.grad_X + at, *const gy = m.grad_y + at;
            if (wide) {
                for (int64_t j = 0; j < p; ++j) to[j] += dt * gX[j] + D[j] * gy[j];
            } else {
                const float skip = D != nullptr ? D[0] : 0.0f;
                for (int64_t j = 0; j < p; ++j) to[j] += dt * gX[j] + skip * gy[j];
            }
        }
    }

    // From grad l to dt A by suffix sums, and through clamp and softplus.
    void finish_dt(const Chunk& chunk, int64_t head, float grad_l_end, float* sums, GradScratch& m) const {
        const float A = in.A.data[head * in.A.stride];
        double suffix = static_cast<double>(grad_l_end), sum_A = 0, sum_bias = 0;
        for (int64_t i = chunk.length - 1; i >= 0; --i) {
            suffix += static_cast<double>(m.grad_l[i]);
            sum_A += suffix * static_cast<double>(m.steps.dt[i]);
            const float raw = (m.grad_dt[i] + A * static_cast<float>(suffix)) * m.slope[i];
            sum_bias += static_cast<double>(raw);
            if (!grad.dt) continue;
            float& to = grad.dt.row(chunk.begin + i)[head];
            to = grad.set.dt ? raw : to + raw;
        }
        sums[0] = static_cast<float>(sum_A);
        sums[1] = static_cast<float>(sum_bias);
    }

    void give_row(const float* row, const View<float, 3>& to, bool set, int64_t t, int64_t group) const {
        if (!to) return;
        float* const out = to.row(t) + group * n;
        if (set) {
            std::copy(row, row + n, out);
        } else {
            add_row(row, n, out);
        }
    }

    // Phase 3.
    void chunk_gradients(int64_t c, int64_t group, GradScratch& m) const {
        const Chunk& chunk = list.chunks[c];
        const int64_t length = chunk.length, per_group = h / g;
        const GroupChunk k = group_chunk(c, group);
        std::fill(m.grad_G, m.grad_G + length * stride_q(), 0.0f);
        std::fill(m.grad_C, m.grad_C + length * stride_n(), 0.0f);
        std::fill(m.grad_B, m.grad_B + length * stride_n(), 0.0f);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
            float* const sums = partials(c, head);
            std::fill(sums, sums + 2 + p, 0.0f);
            load_head(c, head, m);
            grad_within(k, length, m);
            const float leaving = grad_inputs(c, head, k, m);
            const float entering = grad_entering(c, head, k, m);
            finish_x(chunk, head, sums + 2, m);
            finish_dt(chunk, head, leaving + entering, sums, m);
        }
        const Product rows{.a = m.grad_G,
                           .a_row = stride_q(),
                           .a_k = 1,
                           .panel = k.B,
                           .panel_stride = stride_n(),
                           .out = m.grad_C,
                           .out_stride = stride_n(),
                           .rows = length,
                           .columns = n,
                           .depth = length,
                           .beta = &kOne};
        Product columns = rows;
        columns.a_row = 1;
        columns.a_k = stride_q();
        columns.panel = k.C;
        columns.out = m.grad_B;
        if (grad.C) multiply(rows, Triangle::lower);
        if (grad.B) multiply(columns, Triangle::upper);
        for (int64_t i = 0; i < length; ++i) {
            const int64_t t = chunk.begin + i;
            give_row(m.grad_C + i * stride_n(), grad.C, grad.set.C, t, group);
            give_row(m.grad_B + i * stride_n(), grad.B, grad.set.B, t, group);
        }
    }

    // Phase 4.
    void reduce() const {
        const int64_t count = static_cast<int64_t>(list.chunks.size());
        const auto sum = [&](int64_t head, int64_t k) {
            double total = 0;
            for (int64_t c = 0; c < count; ++c) total += static_cast<double>(partials(c, head)[k]);
            return total;
        };
        for (int64_t head = 0; head < h; ++head) {
            if (grad.A) grad.A.data[head * grad.A.stride] += static_cast<float>(sum(head, 0));
            if (grad.dt_bias)
                grad.dt_bias.data[head * grad.dt_bias.stride] += static_cast<float>(sum(head, 1));
            if (!grad.D) continue;
            double all = 0;
            for (int64_t j = 0; j < p; ++j) {
                const double v = sum(head, 2 + j);
                all += v;
                if (grad.D.shape[1] > 1) grad.D.row(head)[j] += static_cast<float>(v);
            }
            if (grad.D.shape[1] == 1) grad.D.row(head)[0] += static_cast<float>(all);
        }
    }

    // Calls f(item, scratch) for each of `items`, contiguous runs on each worker.
    template <class F>
    void for_each(int64_t items, const F& f) const {
        parallel_for(ex, workers, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
            for (int64_t w = begin; w < end; ++w) {
                GradScratch m{};
                place_grad_scratch(scratch + w * scratch_size, q, p, n, m);
                for (int64_t i = items * w / workers; i < items * (w + 1) / workers; ++i) f(i, m);
            }
        });
    }

    void run() const {
        const int64_t count = static_cast<int64_t>(list.chunks.size());
        const int64_t sequences = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
        fill_group_chunks(ex, in, list, 0, count, shared);
        for_each(sequences * h, [&](int64_t i, GradScratch& m) HWY_ATTR { grad_states_of(i / h, i % h, m); });
        for_each(count * g, [&](int64_t i, GradScratch& m) HWY_ATTR { chunk_gradients(i / g, i % g, m); });
        reduce();
    }
};

void backward(const Exec& ex, const SsdInputs<float>& in, View<const float, 4> chunk_states,
              View<const float, 3> grad_y, View<const float, 4> grad_final_state,
              const SsdGradients<float>& grad, int64_t chunk) {
    ChunkList list = ssd_detail::make_chunks(in.cu_seqlens, chunk);
    const int64_t q = list.longest, count = static_cast<int64_t>(list.chunks.size());
    const int64_t h = in.x.shape[1], p = in.x.shape[2], g = in.B.shape[1], n = in.B.shape[2];
    GradScratch none{};
    const int64_t per_worker = place_grad_scratch(nullptr, q, p, n, none), workers = std::max(ex.threads, 1);
    const int64_t shared = count * g * group_chunk_floats(q, n), states = count * h * p * scratch_stride(n);
    const int64_t partial = (count * h * (2 + p) + 15) / 16 * 16;
    const Scratch<float> memory(ex, static_cast<size_t>(shared + states + partial + workers * per_worker));
    float* const m = memory.data();
    Backward{ex,
             in,
             chunk_states,
             grad_y,
             grad_final_state,
             grad,
             std::move(list),
             h,
             p,
             g,
             n,
             q,
             m,
             m + shared,
             m + shared + states,
             m + shared + states + partial,
             per_worker,
             workers}
        .run();
}

}  // namespace

void SsdBackwardF32(const Exec& ex, const SsdInputs<float>& in, View<const float, 4> chunk_states,
                    View<const float, 3> grad_y, View<const float, 4> grad_final_state,
                    const SsdGradients<float>& grad, int64_t chunk) {
    backward(ex, in, chunk_states, grad_y, grad_final_state, grad, chunk);
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(SsdBackwardF32);
}  // namespace ssm

namespace ssm::cpu {

template <>
void ssd_backward<float>(const Exec& ex, const SsdInputs<float>& in, View<const float, 4> chunk_states,
                         View<const float, 3> grad_y, View<const float, 4> grad_final_state,
                         const SsdGradients<float>& grad, int64_t chunk) {
    HWY_DYNAMIC_DISPATCH(SsdBackwardF32)(ex, in, chunk_states, grad_y, grad_final_state, grad, chunk);
}
}  // namespace ssm::cpu
#endif  // HWY_ONCE
