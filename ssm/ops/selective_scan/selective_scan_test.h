// A problem of the CPU's tests of the selective scan, with what the f64 reference makes of it.
#pragma once

#include <cstdint>
#include <vector>

#include "ssm/ops/selective_scan/selective_scan.h"
#include "ssm/ops/selective_scan/selective_scan_reference.h"
#include "tests/support/compare.h"

namespace ssm::test {

struct Flags {
    bool D = true, z = true, bias = true, initial = true, softplus = true;
};

// A problem with all its buffers. `pad` extra elements between rows make them strided and misaligned.
template <class T>
struct Problem {
    int64_t d, n, t, s, pad;
    std::vector<int64_t> cu;
    Flags flags;
    std::vector<T> u, delta, z;
    std::vector<float> A, B, C, D, bias, initial;
    ScanReference reference;

    Problem(int64_t d_, int64_t n_, const std::vector<int64_t>& lengths, int64_t pad_ = 0, Flags flags_ = {},
            uint64_t seed = 1)
        : d(d_), n(n_), s(static_cast<int64_t>(lengths.size())), pad(pad_), cu{0}, flags(flags_) {
        for (int64_t length : lengths) cu.push_back(cu.back() + length);
        t = cu.back();
        Random random(seed);
        u = random.vector<T>((t + 1) * (d + pad));
        z = random.vector<T>((t + 1) * (d + pad), -3.0f, 3.0f);
        delta = random.vector<T>((t + 1) * (d + pad), -4.0f, 1.0f);
        A = random.vector(d * n, -4.0f, -0.01f);
        B = random.vector((t + 1) * (n + pad));
        C = random.vector((t + 1) * (n + pad));
        D = random.vector(d);
        bias = random.vector(d);
        if (!flags.softplus) {
            for (T& x : delta) x = static_cast<T>(0.02f * (static_cast<float>(x) + 5.0f));
            for (float& x : bias) x = 0.01f * (x + 1.0f);
        }
        initial = random.vector(s * d * n);
        fill_reference();
    }

    template <class U>
    std::vector<double> rows(const std::vector<U>& v, int64_t width) const {
        std::vector<double> dense;
        for (int64_t i = 0; i < t; ++i) {
            for (int64_t j = 0; j < width; ++j) {
                dense.push_back(static_cast<double>(static_cast<float>(v[i * (width + pad) + j])));
            }
        }
        return dense;
    }
    void fill_reference() {
        reference.d = d, reference.n = n, reference.cu_seqlens = cu;
        reference.u = rows(u, d), reference.delta = rows(delta, d);
        reference.A = to_double(A), reference.B = rows(B, n), reference.C = rows(C, n);
        if (flags.D) reference.D = to_double(D);
        if (flags.z) reference.z = rows(z, d);
        if (flags.bias) reference.delta_bias = to_double(bias);
        if (flags.initial) reference.initial_state = to_double(initial);
        reference.delta_softplus = flags.softplus;
        reference.run();
    }
    SelectiveScanInputs<T> inputs() const {
        SelectiveScanInputs<T> in;
        in.u = {u.data(), {t, d}, d + pad}, in.delta = {delta.data(), {t, d}, d + pad};
        in.A = {A.data(), {d, n}};
        in.B = {B.data(), {t, n}, n + pad}, in.C = {C.data(), {t, n}, n + pad};
        if (flags.D) in.D = {D.data(), {d}};
        if (flags.z) in.z = {z.data(), {t, d}, d + pad};
        if (flags.bias) in.delta_bias = {bias.data(), {d}};
        if (flags.initial) in.initial_state = {initial.data(), {s, d, n}};
        in.cu_seqlens = cu;
        in.delta_softplus = flags.softplus;
        return in;
    }
};

}  // namespace ssm::test
