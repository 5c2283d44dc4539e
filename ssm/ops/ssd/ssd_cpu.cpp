// SSD forward and step on the CPU.
//
// Forward: per chunk and group G = C B^T once (threads over chunks and groups), then per sequence and head
// the chunks in order with the state S^T [n p] in L1 (threads over sequences and heads). Long inputs go
// through in slabs of chunks, so that the scratch of the first part stays in the cache; the state crosses
// from slab to slab in `carry`.
#include "ssm/core/parallel.h"
#include "ssm/ops/ssd/ssd_impl.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ssm/ops/ssd/ssd_cpu.cpp"  // NOLINT
#include <hwy/foreach_target.h>                       // NOLINT
#include <hwy/highway.h>

#include "ssm/ops/ssd/ssd_chunk-inl.h"
#include "ssm/ops/ssd/ssd_pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ssm::HWY_NAMESPACE {
namespace {

using ssd_detail::Chunk;
using ssd_detail::ChunkList;

constexpr int64_t kSlabFloats = int64_t{2} << 20;

// Scratch of one worker.
struct HeadScratch {
    TimeSteps steps;
    float* X;         // [q p]
    float* X_to_end;  // [q p]
    float* M;         // [q q]
    float* Y;         // [q p]
    float* St;        // [n p]
};

// How a chunk is computed: in f32 here, or in bf16 by PairEngine (ssd_pairs-inl.h).
template <class T>
struct FloatEngine {
    using Scratch = HeadScratch;

    static HWY_INLINE void store(FloatVec v, T* p) { store_floats(v, p); }
    static int64_t group_floats(int64_t q, int64_t n) { return group_chunk_floats(q, n); }
    static int64_t scratch_floats(int64_t q, int64_t p, int64_t n) {
        return time_steps_floats(q) + (3 * q + n) * scratch_stride(p) + q * scratch_stride(q);
    }
    static HeadScratch place(float* memory, int64_t q, int64_t p, int64_t n) {
        const int64_t stride = scratch_stride(p);
        HeadScratch s{};
        s.steps = place_time_steps(memory, q);
        s.X = memory + time_steps_floats(q);
        s.X_to_end = s.X + q * stride;
        s.Y = s.X_to_end + q * stride;
        s.St = s.Y + q * stride;
        s.M = s.St + n * stride;
        return s;
    }
    static void fill(const SsdInputs<T>& in, const Chunk& chunk, int64_t group, int64_t q_max,
                     float* memory) {
        fill_group_chunk(in, chunk, group, scratch_stride(q_max),
                         place_group_chunk(memory, q_max, in.B.shape[2]));
    }
    // Y of one head, and its state after the chunk if `update_state`. `zero_state`: the state entering is
    // zero and St is not read.
    static void chunk(const SsdInputs<T>& in, const Chunk& chunk, int64_t head, int64_t q_max, float* group,
                      HeadScratch& s, bool zero_state, bool update_state);
};

// y = Y + D x of one head and chunk.
template <class Engine, class T>
HWY_INLINE void write_y(const SsdInputs<T>& in, const Chunk& chunk, int64_t head, const float* Y,
                        View<T, 3> out) {
    const FloatTag d;
    const View<const float, 2>& D = in.D;
    const int64_t p = in.x.shape[2], lanes = float_lanes(), stride = scratch_stride(p);
    const float* D_row = D ? D.row(head) : nullptr;
    const bool wide = D && D.shape[1] > 1;
    for (int64_t i = 0; i < chunk.length; ++i) {
        const T* x = in.x.row(chunk.begin + i) + head * p;
        T* y = out.row(chunk.begin + i) + head * p;
        const float* row = Y + i * stride;
        int64_t j = 0;
        for (; j + lanes <= p; j += lanes) {
            FloatVec v = load_floats(row + j);
            if (D_row != nullptr) {
                v = hn::MulAdd(wide ? load_floats(D_row + j) : hn::Set(d, D_row[0]), load_floats(x + j), v);
            }
            Engine::store(v, y + j);
        }
        for (; j < p; ++j) {
            const float skip = D_row == nullptr ? 0.0f : D_row[wide ? j : 0] * static_cast<float>(x[j]);
            y[j] = static_cast<T>(row[j] + skip);
        }
    }
}

// Asks for one head's rows of a chunk, a whole token apart: too far for the hardware to foresee.
template <class T>
HWY_INLINE void prefetch_rows(const View<const T, 3>& rows, const Chunk& chunk, int64_t head) {
    const int64_t p = rows.shape[2], line = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < chunk.length; ++i) {
        const T* const row = rows.row(chunk.begin + i) + head * p;
        for (int64_t j = 0; j < p; j += line) __builtin_prefetch(row + j);
    }
}

template <class T>
void FloatEngine<T>::chunk(const SsdInputs<T>& in, const Chunk& chunk, int64_t head, int64_t q_max,
                           float* group, HeadScratch& s, bool zero_state, bool update_state) {
    const int64_t p = in.x.shape[2], n = in.B.shape[2], q = chunk.length;
    const int64_t stride_p = scratch_stride(p), stride_n = scratch_stride(n),
                  stride_q = scratch_stride(q_max);
    const GroupChunk shared = place_group_chunk(group, q_max, n);
    load_time_steps(in, chunk, head, s.steps);
    pack_x(in, chunk, head, s.steps, s.X, s.X_to_end);
    float* const M = s.M;
    const float* const G = shared.G;
    for_each_decay(
        s.steps, q,
        [=](int64_t i, int64_t j, FloatVec L)
            HWY_ATTR { store_floats(hn::Mul(L, load_floats(G + i * stride_q + j)), M + i * stride_q + j); },
        [](int64_t) {});
    if (!zero_state) {
        multiply({.a = shared.C,
                  .a_row = stride_n,
                  .a_k = 1,
                  .panel = s.St,
                  .panel_stride = stride_p,
                  .out = s.Y,
                  .out_stride = stride_p,
                  .rows = q,
                  .columns = p,
                  .depth = n});
    }
    multiply({.a = M,
              .a_row = stride_q,
              .a_k = 1,
              .panel = s.X,
              .panel_stride = stride_p,
              .out = s.Y,
              .out_stride = stride_p,
              .rows = q,
              .columns = p,
              .depth = q,
              .beta = zero_state ? nullptr : s.steps.from_start,
              .beta_stride = 1},
             Triangle::lower);
    if (update_state) {
        multiply({.a = shared.B,
                  .a_row = 1,
                  .a_k = stride_n,
                  .panel = s.X_to_end,
                  .panel_stride = stride_p,
                  .out = s.St,
                  .out_stride = stride_p,
                  .rows = n,
                  .columns = p,
                  .depth = q,
                  .beta = zero_state ? nullptr : &s.steps.total});
    }
}

// A new session's state is zero: the first chunk then needs no product with it.
bool all_zero(const float* x, int64_t count) {
    const FloatTag d;
    int64_t i = 0;
    for (; i + float_lanes() <= count; i += float_lanes()) {
        if (!hn::AllTrue(d, hn::Eq(load_floats(x + i), hn::Zero(d)))) return false;
    }
    return std::all_of(x + i, x + count, [](float v) { return v == 0.0f; });
}

// [p n] dense -> S^T with zero padding, and back.
void load_state(const float* state, int64_t p, int64_t n, float* St) {
    const int64_t stride = scratch_stride(p);
    if (state == nullptr) {
        std::fill(St, St + n * stride, 0.0f);
        return;
    }
    transpose(state, n, p, n, St, stride);
    zero_padding(St, stride, n, p);
}
void store_state(const float* St, int64_t p, int64_t n, float* state) {
    transpose(St, scratch_stride(p), n, p, state, n);
}

template <class T, class Engine>
struct Forward {
    const Exec& ex;
    const SsdInputs<T>& in;
    View<T, 3> y;
    View<float, 4> final_state, chunk_states;
    ChunkList list;
    int64_t h, p, g, n, q;  // q: the longest chunk
    float *shared, *carry_in, *carry_out, *scratch;
    int64_t workers;

    // The chunks of sequence s inside first .. last, for one head.
    void run_head(int64_t s, int64_t head, int64_t first, int64_t last, typename Engine::Scratch& m) const {
        const int64_t begin = std::max(first, list.first[s]), end = std::min(last, list.first[s + 1]);
        const bool starts = begin == list.first[s], ends = end == list.first[s + 1];
        const float* initial = in.initial_state ? in.initial_state.row(s) + head * p * n : nullptr;
        const int64_t St_size = n * scratch_stride(p);
        bool zero_state = starts && (initial == nullptr || all_zero(initial, p * n));
        if (starts) {
            load_state(zero_state ? nullptr : initial, p, n, m.St);
        } else {
            std::copy(carry_in + head * St_size, carry_in + (head + 1) * St_size, m.St);
        }
        for (int64_t c = begin; c < end; ++c) {
            if (chunk_states) store_state(m.St, p, n, chunk_states.row(c) + head * p * n);
            float* const group = shared + ((c - first) * g + head / (h / g)) * Engine::group_floats(q, n);
            const bool update_state = c + 1 < end || !ends || final_state;
            if (c + 1 < end) prefetch_rows(in.x, list.chunks[c + 1], head);
            Engine::chunk(in, list.chunks[c], head, q, group, m, zero_state, update_state);
            write_y<Engine>(in, list.chunks[c], head, m.Y, y);
            zero_state = false;
        }
        if (ends && final_state) store_state(m.St, p, n, final_state.row(s) + head * p * n);
        if (!ends) std::copy(m.St, m.St + St_size, carry_out + head * St_size);
    }

    // All sequences that own or, when empty, lie at a chunk of first .. last; work is split by tokens.
    void run_slab(int64_t first, int64_t last, int64_t s_begin, int64_t s_end) const {
        const auto cost = [&](int64_t s) {
            return 1 +
                   std::max<int64_t>(0, std::min(last, list.first[s + 1]) - std::max(first, list.first[s]));
        };
        int64_t total = 0;
        for (int64_t s = s_begin; s < s_end; ++s) total += h * cost(s);
        parallel_for(ex, workers, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
            for (int64_t w = begin; w < end; ++w) {
                typename Engine::Scratch m =
                    Engine::place(scratch + w * Engine::scratch_floats(q, p, n), q, p, n);
                int64_t position = 0;
                for (int64_t s = s_begin; s < s_end; ++s) {
                    for (int64_t head = 0; head < h; ++head, position += cost(s)) {
                        if (position * workers / total == w) run_head(s, head, first, last, m);
                    }
                }
            }
        });
    }
};

template <class T, class Engine = FloatEngine<T>>
void forward(const Exec& ex, const SsdInputs<T>& in, View<T, 3> y, View<float, 4> final_state,
             View<float, 4> chunk_states, int64_t chunk) {
    ChunkList list = ssd_detail::make_chunks(in.cu_seqlens, chunk);
    const int64_t q = list.longest, count = static_cast<int64_t>(list.chunks.size());
    const int64_t h = in.x.shape[1], p = in.x.shape[2], g = in.B.shape[1], n = in.B.shape[2];
    const int64_t per_chunk = g * Engine::group_floats(q, n), per_worker = Engine::scratch_floats(q, p, n);
    const int64_t slab = std::max<int64_t>(1, std::min(count, kSlabFloats / per_chunk));
    const int64_t carry = h * n * scratch_stride(p), workers = std::max(ex.threads, 1);
    const Scratch<float> memory(ex, static_cast<size_t>(slab * per_chunk + 2 * carry + workers * per_worker));
    float* const carry_memory = memory.data() + slab * per_chunk;
    Forward<T, Engine> f{ex,
                         in,
                         y,
                         final_state,
                         chunk_states,
                         std::move(list),
                         h,
                         p,
                         g,
                         n,
                         q,
                         memory.data(),
                         carry_memory,
                         carry_memory + carry,
                         carry_memory + 2 * carry,
                         workers};
    const int64_t sequences = static_cast<int64_t>(in.cu_seqlens.size()) - 1;
    int64_t s = 0, first = 0;
    do {
        const int64_t last = std::min(count, first + slab);
        parallel_for(ex, (last - first) * g, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
            for (int64_t i = begin; i < end; ++i) {
                Engine::fill(in, f.list.chunks[first + i / g], i % g, q,
                             f.shared + i * Engine::group_floats(q, n));
            }
        });
        int64_t s_end = s;  // one past the last sequence with work in this slab
        while (s_end < sequences && (f.list.first[s_end] < last || f.list.first[s_end + 1] <= last)) ++s_end;
        f.run_slab(first, last, s, s_end);
        std::swap(f.carry_in, f.carry_out);
        s = s_end > s && f.list.first[s_end] > last ? s_end - 1 : s_end;
        first = last;
    } while (first < count);
}

// Consecutive rows of one head's state.
template <class T>
struct StepRows {
    float dt, decay;
    const T *x, *B, *C;
    const float* D;  // or null
    int64_t D_step;
    float* state;
    T* y;

    StepRows from(int64_t row, int64_t n) const {
        StepRows s = *this;
        s.x += row;
        s.y += row;
        s.state += row * n;
        s.D += s.D != nullptr ? row * D_step : 0;
        return s;
    }
};

template <class T>
StepRows<T> step_rows_of(const SsdInputs<T>& in, int64_t s, int64_t head, View<float, 4> state,
                         View<T, 3> y) {
    const FloatTag d;
    const int64_t h = in.x.shape[1], p = in.x.shape[2], g = in.B.shape[1], n = in.B.shape[2];
    const float bias = in.dt_bias ? in.dt_bias.data[head * in.dt_bias.stride] : 0.0f;
    const FloatVec dt_v = time_step(in, hn::Set(d, static_cast<float>(in.dt.row(s)[head]) + bias));
    const float dt = hn::GetLane(dt_v);
    return {.dt = dt,
            .decay = hn::GetLane(decay(hn::Set(d, dt * in.A.data[head * in.A.stride]))),
            .x = in.x.row(s) + head * p,
            .B = in.B.row(s) + head / (h / g) * n,
            .C = in.C.row(s) + head / (h / g) * n,
            .D = in.D ? in.D.row(head) : nullptr,
            .D_step = in.D && in.D.shape[1] > 1 ? 1 : 0,
            .state = state.row(slot_of(in.slots, s)) + head * p * n,
            .y = y.row(s) + head * p};
}

// `rows` rows of each stream, side by side, in one pass over memory.
template <int kStreams, class T>
HWY_INLINE void step_streams(const StepRows<T>* streams, int64_t rows, int64_t n) {
    const FloatTag d;
    const int64_t lanes = float_lanes(), whole = n / lanes * lanes;
    for (int64_t row = 0; row < rows; ++row) {
        FloatVec sum[kStreams], X[kStreams], decays[kStreams];
#pragma GCC unroll 4
        for (int r = 0; r < kStreams; ++r) {
            sum[r] = hn::Zero(d);
            X[r] = hn::Set(d, streams[r].dt * static_cast<float>(streams[r].x[row]));
            decays[r] = hn::Set(d, streams[r].decay);
        }
        for (int64_t i = 0; i < whole; i += lanes) {
#pragma GCC unroll 4
            for (int r = 0; r < kStreams; ++r) {
                float* const s = streams[r].state + row * n + i;
                const FloatVec input = hn::Mul(X[r], load_floats(streams[r].B + i));
                const FloatVec v = hn::MulAdd(decays[r], load_floats(s), input);
                store_floats(v, s);
                sum[r] = hn::MulAdd(load_floats(streams[r].C + i), v, sum[r]);
            }
        }
        for (int r = 0; r < kStreams; ++r) {
            const StepRows<T>& s = streams[r];
            const float x = static_cast<float>(s.x[row]);
            float out = hn::GetLane(hn::SumOfLanes(d, sum[r]));
            for (int64_t k = whole; k < n; ++k) {
                float& v = s.state[row * n + k];
                v = s.decay * v + s.dt * x * static_cast<float>(s.B[k]);
                out += static_cast<float>(s.C[k]) * v;
            }
            s.y[row] = static_cast<T>(out + (s.D != nullptr ? s.D[row * s.D_step] * x : 0.0f));
        }
    }
}

// A thread reads its states as kStreams long streams, a quarter of its heads each: the hardware's prefetchers
// follow a stream, and would have to find it again for every block of neighbouring rows.
template <class T>
void step(const Exec& ex, const SsdInputs<T>& in, View<float, 4> state, View<T, 3> y) {
    constexpr int kStreams = 4;
    const int64_t h = in.x.shape[1], p = in.x.shape[2], n = in.B.shape[2];
    parallel_for(ex, in.x.shape[0] * h, 1, [&](int64_t begin, int64_t end) HWY_ATTR {
        const auto rows_of = [&](int64_t i) { return step_rows_of(in, i / h, i % h, state, y); };
        const int64_t quarter = (end - begin) / kStreams;
        for (int64_t i = begin; i < begin + quarter; ++i) {
            const StepRows<T> streams[kStreams] = {rows_of(i), rows_of(i + quarter), rows_of(i + 2 * quarter),
                                                   rows_of(i + 3 * quarter)};
            step_streams<kStreams>(streams, p, n);
        }
        const int64_t part = p / kStreams;
        for (int64_t i = begin + kStreams * quarter; i < end; ++i) {
            const StepRows<T> head = rows_of(i);
            const StepRows<T> streams[kStreams] = {head, head.from(part, n), head.from(2 * part, n),
                                                   head.from(3 * part, n)};
            step_streams<kStreams>(streams, part, n);
            const StepRows<T> last = head.from(kStreams * part, n);
            step_streams<1>(&last, p - kStreams * part, n);
        }
    });
}

}  // namespace

void SsdF32(const Exec& ex, const SsdInputs<float>& in, View<float, 3> y, View<float, 4> final_state,
            View<float, 4> chunk_states, int64_t chunk) {
    forward(ex, in, y, final_state, chunk_states, chunk);
}
void SsdBf16(const Exec& ex, const SsdInputs<bf16>& in, View<bf16, 3> y, View<float, 4> final_state,
             View<float, 4> chunk_states, int64_t chunk) {
#if SSM_SSD_PAIRS
    if (PairEngine::suits(in.x.shape[2], in.B.shape[2])) {
        return forward<bf16, PairEngine>(ex, in, y, final_state, chunk_states, chunk);
    }
#endif
    forward(ex, in, y, final_state, chunk_states, chunk);
}
void SsdStepF32(const Exec& ex, const SsdInputs<float>& in, View<float, 4> state, View<float, 3> y) {
    step(ex, in, state, y);
}
void SsdStepBf16(const Exec& ex, const SsdInputs<bf16>& in, View<float, 4> state, View<bf16, 3> y) {
    step(ex, in, state, y);
}

}  // namespace ssm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ssm {
HWY_EXPORT(SsdF32);
HWY_EXPORT(SsdBf16);
HWY_EXPORT(SsdStepF32);
HWY_EXPORT(SsdStepBf16);
}  // namespace ssm

namespace ssm::cpu {

template <>
void ssd<float>(const Exec& ex, const SsdInputs<float>& in, View<float, 3> y, View<float, 4> final_state,
                View<float, 4> chunk_states, int64_t chunk) {
    HWY_DYNAMIC_DISPATCH(SsdF32)(ex, in, y, final_state, chunk_states, chunk);
}
template <>
void ssd<bf16>(const Exec& ex, const SsdInputs<bf16>& in, View<bf16, 3> y, View<float, 4> final_state,
               View<float, 4> chunk_states, int64_t chunk) {
    HWY_DYNAMIC_DISPATCH(SsdBf16)(ex, in, y, final_state, chunk_states, chunk);
}
template <>
void ssd_step<float>(const Exec& ex, const SsdInputs<float>& in, View<float, 4> state, View<float, 3> y) {
    HWY_DYNAMIC_DISPATCH(SsdStepF32)(ex, in, state, y);
}
template <>
void ssd_step<bf16>(const Exec& ex, const SsdInputs<bf16>& in, View<float, 4> state, View<bf16, 3> y) {
    HWY_DYNAMIC_DISPATCH(SsdStepBf16)(ex, in, state, y);
}

}  // namespace ssm::cpu
#endif  // HWY_ONCE
