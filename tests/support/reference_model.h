// A whole language model in f64, by definition and in plain loops: Mamba-1 (also with FalconMamba's norm of
// delta, B and C), Mamba-2, embedding, residual blocks, head, loss. Shares no code with ssm/; written from
// the equations. Slow on purpose: one token after another, no caching, no packing: a batch is one call a
// sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace ssm::test {

struct ReferenceShape {
    enum class Kind { mamba, mamba2 } kind = Kind::mamba;
    int64_t vocab = 11, e = 8, layers = 2, d = 16, n = 4, k = 4;
    double norm_eps = 1e-5;
    bool tied = true, projection_bias = false, conv_bias = true;
    // Mamba-1
    int64_t r = 2;
    double bcdt_eps = 0;  // > 0: FalconMamba's norm
    // Mamba-2
    int64_t h = 2, p = 8, g = 1, norm_groups = 1;
    bool D_has_hdim = false, norm_before_gate = false;
    double dt_min = 0, dt_max = std::numeric_limits<double>::infinity();
    std::string embedding = "backbone.embeddings.weight";

    int64_t conv_channels() const { return kind == Kind::mamba ? d : d + 2 * g * n; }
};

// Mamba-2 with groups, another convolution, a head of its own and biases.
inline ReferenceShape mamba2_with_groups() {
    return {.kind = ReferenceShape::Kind::mamba2,
            .e = 16,
            .d = 32,
            .n = 8,
            .k = 3,
            .tied = false,
            .projection_bias = true,
            .h = 4,
            .g = 2};
}

struct ReferenceState {
    std::vector<double> conv;  // [k-1 channels]: the last inputs of the convolution
    std::vector<double> ssm;   // [d n] or [h p n]
};

class ReferenceModel {
public:
    using Values = std::vector<double>;

    ReferenceShape shape;
    std::map<std::string, Values> parameters;  // by checkpoint name

    // Logits [t v] of one sequence from the zero state; `states`, one a layer, where it ends.
    Values logits(std::span<const int32_t> ids, std::vector<ReferenceState>* states = nullptr) const {
        const auto t = static_cast<int64_t>(ids.size());
        const Values& table = parameters.at(shape.embedding);
        Values x(static_cast<size_t>(t * shape.e));
        for (int64_t i = 0; i < t; ++i) {
            for (int64_t j = 0; j < shape.e; ++j) x[i * shape.e + j] = table[ids[i] * shape.e + j];
        }
        for (int64_t layer = 0; layer < shape.layers; ++layer) {
            const std::string name = "backbone.layers." + std::to_string(layer) + ".";
            const Values u = norm(x, parameters.at(name + "norm.weight"), shape.norm_eps);
            ReferenceState state;
            const Values y = shape.kind == ReferenceShape::Kind::mamba ? mamba(u, name + "mixer.", state)
                                                                       : mamba2(u, name + "mixer.", state);
            for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
            if (states != nullptr) states->push_back(state);
        }
        x = norm(x, parameters.at("backbone.norm_f.weight"), shape.norm_eps);
        return matmul(x, shape.tied ? table : parameters.at("lm_head.weight"), shape.e, {});
    }

    // Of sequences packed one after another.
    Values logits(std::span<const int32_t> ids, std::span<const int64_t> cu_seqlens) const {
        Values all;
        for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
            const auto length = static_cast<size_t>(cu_seqlens[s + 1] - cu_seqlens[s]);
            const Values one = logits(ids.subspan(static_cast<size_t>(cu_seqlens[s]), length));
            all.insert(all.end(), one.begin(), one.end());
        }
        return all;
    }

    // nll of every target; 0 where it is < 0.
    Values nll(std::span<const int32_t> ids, std::span<const int32_t> targets,
               std::span<const int64_t> cu_seqlens) const {
        const Values all = logits(ids, cu_seqlens);
        Values result(ids.size(), 0.0);
        for (size_t i = 0; i < ids.size(); ++i) {
            if (targets[i] < 0) continue;
            const double* row = all.data() + static_cast<int64_t>(i) * shape.vocab;
            const double largest = *std::max_element(row, row + shape.vocab);
            double sum = 0;
            for (int64_t j = 0; j < shape.vocab; ++j) sum += std::exp(row[j] - largest);
            result[i] = largest + std::log(sum) - row[targets[i]];
        }
        return result;
    }

    // Mean over the targets >= 0.
    double loss(std::span<const int32_t> ids, std::span<const int32_t> targets,
                std::span<const int64_t> cu_seqlens) const {
        double sum = 0;
        for (const double x : nll(ids, targets, cu_seqlens)) sum += x;
        return sum / static_cast<double>(
                         std::count_if(targets.begin(), targets.end(), [](int32_t x) { return x >= 0; }));
    }

private:
    static double silu(double x) { return x / (1 + std::exp(-x)); }
    static double softplus(double x) { return x > 30 ? x : std::log1p(std::exp(x)); }

    // x [t i] weight[o i]^T + bias
    static Values matmul(const Values& x, const Values& weight, int64_t i_size, const Values& bias) {
        const auto t = static_cast<int64_t>(x.size()) / i_size,
                   o_size = static_cast<int64_t>(weight.size()) / i_size;
        Values y(static_cast<size_t>(t * o_size));
        for (int64_t row = 0; row < t; ++row) {
            for (int64_t o = 0; o < o_size; ++o) {
                double sum = bias.empty() ? 0.0 : bias[o];
                for (int64_t i = 0; i < i_size; ++i) sum += x[row * i_size + i] * weight[o * i_size + i];
                y[row * o_size + o] = sum;
            }
        }
        return y;
    }
    Values optional(const std::string& name) const {
        const auto at = parameters.find(name);
        return at == parameters.end() ? Values() : at->second;
    }
    // RMSNorm over groups of each row; the row is as long as the weight.
    static Values norm(const Values& x, const Values& weight, double eps, int64_t groups = 1) {
        const auto width = static_cast<int64_t>(weight.size()), part = width / groups;
        Values y(x.size());
        for (size_t begin = 0; begin < x.size(); begin += static_cast<size_t>(part)) {
            double squares = 0;
            for (int64_t i = 0; i < part; ++i) squares += x[begin + i] * x[begin + i];
            const double scale = 1 / std::sqrt(squares / static_cast<double>(part) + eps);
            for (int64_t i = 0; i < part; ++i) {
                y[begin + i] = x[begin + i] * scale * weight[(begin + i) % static_cast<size_t>(width)];
            }
        }
        return y;
    }
    // Columns begin .. begin+count of rows of `width`.
    static Values columns(const Values& x, int64_t width, int64_t begin, int64_t count) {
        Values y;
        for (size_t row = 0; row < x.size(); row += static_cast<size_t>(width)) {
            y.insert(y.end(), x.begin() + static_cast<int64_t>(row) + begin,
                     x.begin() + static_cast<int64_t>(row) + begin + count);
        }
        return y;
    }
    // silu(causal depthwise convolution); `tail`: the last k-1 inputs, zeros before the start.
    Values convolve(const Values& x, const std::string& name, Values& tail) const {
        const int64_t c = shape.conv_channels(), k = shape.k, t = static_cast<int64_t>(x.size()) / c;
        const Values &weight = parameters.at(name + "conv1d.weight"), bias = optional(name + "conv1d.bias");
        const auto input = [&](int64_t at, int64_t j) { return at < 0 ? 0.0 : x[at * c + j]; };
        Values y(x.size());
        for (int64_t i = 0; i < t; ++i) {
            for (int64_t j = 0; j < c; ++j) {
                double sum = bias.empty() ? 0.0 : bias[j];
                for (int64_t w = 0; w < k; ++w) sum += weight[j * k + w] * input(i - k + 1 + w, j);
                y[i * c + j] = silu(sum);
            }
        }
        for (int64_t i = t - k + 1; i < t; ++i) {
            for (int64_t j = 0; j < c; ++j) tail.push_back(input(i, j));
        }
        return y;
    }

    Values mamba(const Values& u, const std::string& name, ReferenceState& state) const {
        const int64_t d = shape.d, n = shape.n, r = shape.r, t = static_cast<int64_t>(u.size()) / shape.e;
        const Values xz =
            matmul(u, parameters.at(name + "in_proj.weight"), shape.e, optional(name + "in_proj.bias"));
        const Values z = columns(xz, 2 * d, d, d);
        const Values x = convolve(columns(xz, 2 * d, 0, d), name, state.conv);
        const Values dbc = matmul(x, parameters.at(name + "x_proj.weight"), d, {});
        Values low = columns(dbc, r + 2 * n, 0, r), B = columns(dbc, r + 2 * n, r, n),
               C = columns(dbc, r + 2 * n, r + n, n);
        if (shape.bcdt_eps > 0) {
            low = norm(low, Values(static_cast<size_t>(r), 1.0), shape.bcdt_eps);
            B = norm(B, Values(static_cast<size_t>(n), 1.0), shape.bcdt_eps);
            C = norm(C, Values(static_cast<size_t>(n), 1.0), shape.bcdt_eps);
        }
        const Values delta =
            matmul(low, parameters.at(name + "dt_proj.weight"), r, parameters.at(name + "dt_proj.bias"));
        const Values &A_log = parameters.at(name + "A_log"), &D = parameters.at(name + "D");
        state.ssm.assign(static_cast<size_t>(d * n), 0.0);
        Values y(x.size());
        for (int64_t i = 0; i < t; ++i) {
            for (int64_t j = 0; j < d; ++j) {
                const double dt = softplus(delta[i * d + j]), xj = x[i * d + j];
                double sum = D[j] * xj;
                for (int64_t s = 0; s < n; ++s) {
                    double& h = state.ssm[j * n + s];
                    h = std::exp(-dt * std::exp(A_log[j * n + s])) * h + dt * xj * B[i * n + s];
                    sum += C[i * n + s] * h;
                }
                y[i * d + j] = sum * silu(z[i * d + j]);
            }
        }
        return matmul(y, parameters.at(name + "out_proj.weight"), d, optional(name + "out_proj.bias"));
    }

    Values mamba2(const Values& u, const std::string& name, ReferenceState& state) const {
        const int64_t d = shape.d, n = shape.n, h = shape.h, p = shape.p, g = shape.g;
        const int64_t t = static_cast<int64_t>(u.size()) / shape.e, c = shape.conv_channels();
        const Values projected =
            matmul(u, parameters.at(name + "in_proj.weight"), shape.e, optional(name + "in_proj.bias"));
        const int64_t width = d + c + h;
        const Values z = columns(projected, width, 0, d), raw_dt = columns(projected, width, d + c, h);
        const Values xBC = convolve(columns(projected, width, d, c), name, state.conv);
        const Values &A_log = parameters.at(name + "A_log"), &D = parameters.at(name + "D"),
                     &dt_bias = parameters.at(name + "dt_bias");
        state.ssm.assign(static_cast<size_t>(d * n), 0.0);
        Values y(static_cast<size_t>(t * d));
        for (int64_t i = 0; i < t; ++i) {
            const double *x = &xBC[i * c], *B = x + d, *C = B + g * n;
            for (int64_t head = 0; head < h; ++head) {
                const double raw = softplus(raw_dt[i * h + head] + dt_bias[head]);
                const double dt = std::min(std::max(raw, shape.dt_min), shape.dt_max);
                const double decay = std::exp(-dt * std::exp(A_log[head]));
                const int64_t group = head / (h / g);
                for (int64_t j = head * p; j < (head + 1) * p; ++j) {
                    double sum = D[shape.D_has_hdim ? j : head] * x[j];
                    for (int64_t s = 0; s < n; ++s) {
                        double& S = state.ssm[j * n + s];
                        S = decay * S + dt * x[j] * B[group * n + s];
                        sum += S * C[group * n + s];
                    }
                    y[i * d + j] = sum;
                }
            }
        }
        const Values& weight = parameters.at(name + "norm.weight");
        if (!shape.norm_before_gate) {
            for (size_t i = 0; i < y.size(); ++i) y[i] *= silu(z[i]);
        }
        y = norm(y, weight, shape.norm_eps, shape.norm_groups);
        if (shape.norm_before_gate) {
            for (size_t i = 0; i < y.size(); ++i) y[i] *= silu(z[i]);
        }
        return matmul(y, parameters.at(name + "out_proj.weight"), d, optional(name + "out_proj.bias"));
    }
};

}  // namespace ssm::test
