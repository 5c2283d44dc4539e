// The operator by definition, in f64, token by token, and random inputs for it. For tests and benchmark.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "ssm/ops/ssd/ssd.h"
#include "tests/support/compare.h"

namespace ssm::test {

struct SsdCase {
    int64_t h = 2, p = 3, g = 1, n = 4;
    std::vector<int64_t> cu_seqlens{0, 1};
    bool initial_state = true, dt_bias = true, dt_softplus = true;
    int64_t D_width = 1;  // 0: absent, 1 or p
    float dt_min = 0.0f, dt_max = INFINITY;
    int64_t padding = 0;  // extra elements in each token row of x, dt, B, C, y

    int64_t t() const { return cu_seqlens.back(); }
    int64_t s() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

// Values of all arguments, dense.
template <class R>
struct SsdValues {
    std::vector<R> x, dt, A, B, C, D, dt_bias, initial_state;
};

inline SsdValues<float> random_ssd(const SsdCase& c, uint64_t seed) {
    Random random(seed);
    SsdValues<float> v;
    v.x = random.vector(c.t() * c.h * c.p);
    v.dt = c.dt_softplus ? random.vector(c.t() * c.h, -3.0f, 1.5f) : random.vector(c.t() * c.h, 0.01f, 0.5f);
    v.A = random.vector(c.h, -2.0f, -0.1f);
    v.B = random.vector(c.t() * c.g * c.n);
    v.C = random.vector(c.t() * c.g * c.n);
    v.D = random.vector(c.h * c.D_width);
    if (c.dt_bias)
        v.dt_bias = c.dt_softplus ? random.vector(c.h, -1.0f, 0.0f) : random.vector(c.h, 0.0f, 0.3f);
    v.initial_state = c.initial_state ? random.vector(c.s() * c.h * c.p * c.n) : std::vector<float>();
    return v;
}

template <class From>
SsdValues<double> to_double(const SsdValues<From>& v) {
    return {to_double(v.x), to_double(v.dt), to_double(v.A),       to_double(v.B),
            to_double(v.C), to_double(v.D),  to_double(v.dt_bias), to_double(v.initial_state)};
}

struct SsdResult {
    std::vector<double> y, final_state;
};

inline SsdResult reference_ssd(const SsdCase& c, const SsdValues<double>& v) {
    SsdResult r;
    r.y.assign(c.t() * c.h * c.p, 0.0);
    r.final_state.assign(c.s() * c.h * c.p * c.n, 0.0);
    for (int64_t s = 0; s < c.s(); ++s) {
        for (int64_t h = 0; h < c.h; ++h) {
            for (int64_t p = 0; p < c.p; ++p) {
                const int64_t at = ((s * c.h + h) * c.p + p) * c.n, group = h / (c.h / c.g);
                double* S = &r.final_state[at];
                for (int64_t n = 0; n < c.n && c.initial_state; ++n) S[n] = v.initial_state[at + n];
                for (int64_t t = c.cu_seqlens[s]; t < c.cu_seqlens[s + 1]; ++t) {
                    double dt = v.dt[t * c.h + h] + (c.dt_bias ? v.dt_bias[h] : 0.0);
                    if (c.dt_softplus) {
                        dt = std::log1p(std::exp(dt));
                        dt = dt < c.dt_min ? c.dt_min : dt > c.dt_max ? c.dt_max : dt;
                    }
                    const double x = v.x[(t * c.h + h) * c.p + p];
                    double y = c.D_width == 0 ? 0.0 : v.D[h * c.D_width + (c.D_width > 1 ? p : 0)] * x;
                    for (int64_t n = 0; n < c.n; ++n) {
                        const int64_t k = (t * c.g + group) * c.n + n;
                        S[n] = std::exp(dt * v.A[h]) * S[n] + dt * x * v.B[k];
                        y += S[n] * v.C[k];
                    }
                    r.y[(t * c.h + h) * c.p + p] = y;
                }
            }
        }
    }
    return r;
}

// Rows spread out in memory: `padding` NaN elements behind each, and one before all, so that nothing is
// aligned.
template <class T>
class StridedRows {
public:
    StridedRows(int64_t rows, int64_t width, int64_t padding)
        : rows_(rows), width_(width), stride_(width + padding), memory_(nan_vector<T>(1 + rows * stride_)) {}
    StridedRows(const std::vector<T>& dense, int64_t rows, int64_t padding)
        : StridedRows(rows, rows ? static_cast<int64_t>(dense.size()) / rows : 0, padding) {
        for (int64_t i = 0; i < rows_; ++i) {
            for (int64_t j = 0; j < width_; ++j) memory_[1 + i * stride_ + j] = dense[i * width_ + j];
        }
    }
    template <class U, int R>
    View<U, R> view(std::array<int64_t, R> shape) {
        return View<U, R>(memory_.data() + 1, shape, stride_);
    }
    std::vector<T> dense() const {
        std::vector<T> values;
        for (int64_t i = 0; i < rows_; ++i) {
            for (int64_t j = 0; j < width_; ++j) values.push_back(memory_[1 + i * stride_ + j]);
        }
        return values;
    }
    // Nothing was written outside the rows.
    bool padding_intact() const {
        bool intact = std::isnan(static_cast<float>(memory_[0]));
        for (int64_t i = 0; i < rows_; ++i) {
            for (int64_t j = width_; j < stride_; ++j) {
                intact = intact && std::isnan(static_cast<float>(memory_[1 + i * stride_ + j]));
            }
        }
        return intact;
    }

private:
    int64_t rows_, width_, stride_;
    std::vector<T> memory_;
};

// Owns the arguments and gives views of them.
template <class T>
class SsdArguments {
public:
    SsdArguments(const SsdCase& c, const SsdValues<float>& v)
        : c_(c),
          x_(convert(v.x), c.t(), c.padding),
          dt_(convert(v.dt), c.t(), c.padding),
          B_(convert(v.B), c.t(), c.padding),
          C_(convert(v.C), c.t(), c.padding),
          v_(v) {}

    SsdInputs<T> inputs() {
        SsdInputs<T> in;
        in.x = x_.template view<const T, 3>({c_.t(), c_.h, c_.p});
        in.dt = dt_.template view<const T, 2>({c_.t(), c_.h});
        in.A = View<const float, 1>(v_.A.data(), {c_.h});
        in.B = B_.template view<const T, 3>({c_.t(), c_.g, c_.n});
        in.C = C_.template view<const T, 3>({c_.t(), c_.g, c_.n});
        if (c_.D_width > 0) in.D = View<const float, 2>(v_.D.data(), {c_.h, c_.D_width});
        if (c_.dt_bias) in.dt_bias = View<const float, 1>(v_.dt_bias.data(), {c_.h});
        in.cu_seqlens = c_.cu_seqlens;
        if (c_.initial_state) {
            in.initial_state = View<const float, 4>(v_.initial_state.data(), {c_.s(), c_.h, c_.p, c_.n});
        }
        in.dt_softplus = c_.dt_softplus;
        in.dt_min = c_.dt_min;
        in.dt_max = c_.dt_max;
        return in;
    }
    // What the kernel sees, after rounding to T.
    SsdValues<double> values() const {
        SsdValues<double> d = to_double(v_);
        d.x = to_double(convert(v_.x));
        d.dt = to_double(convert(v_.dt));
        d.B = to_double(convert(v_.B));
        d.C = to_double(convert(v_.C));
        return d;
    }

private:
    static std::vector<T> convert(const std::vector<float>& v) {
        std::vector<T> r;
        for (float x : v) r.push_back(static_cast<T>(x));
        return r;
    }
    SsdCase c_;
    StridedRows<T> x_, dt_, B_, C_;
    SsdValues<float> v_;
};

}  // namespace ssm::test
