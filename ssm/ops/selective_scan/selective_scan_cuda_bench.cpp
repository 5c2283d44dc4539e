// The selective scan on a GPU at the shapes that mamba_ssm's time is known for (bf16, n 16, D, z, delta_bias,
// softplus). Floor: 16 exponentials per clock and multiprocessor, each counted once forward and twice
// backward, or bytes at the rate of a copy, whichever takes longer. Refuses to time a wrong answer.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ssm/core/cuda/context.h"
#include "ssm/ops/selective_scan/selective_scan.h"
#include "tests/support/compare.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

using TimeParallel = SelectiveScanOptions::TimeParallel;

constexpr double kExpPerSecond = 16.0 * 132 * 1.755e9, kCopyBytesPerSecond = 3.02e12;

struct Shape4 {
    int64_t b, d, l;
    double forward, backward;  // mamba_ssm, ms
};
constexpr Shape4 kShapes[] = {{8, 1536, 2048, 0.449, 1.846},
                              {8, 4096, 2048, 1.160, 4.766},
                              {1, 4096, 32768, 3.05, 10.2},
                              {1, 1536, 131072, 4.51, 15.4}};

struct Buffers {
    Tensor u, z, delta, A, B, C, D, bias, y, states, grad_y, gu, gdelta, gz, gA, gB, gC, gD, gbias;
    std::vector<int64_t> cu;
};

Buffers make(const Exec& ex, int64_t b, int64_t d, int64_t l) {
    test::Random random(1);
    Buffers f;
    for (int64_t i = 0; i <= b; ++i) f.cu.push_back(i * l);
    const int64_t t = b * l;
    const Exec cpu = make_cpu_exec(1);
    // Random numbers of a tile repeated: drawing all of them would take longer than the measurement.
    const auto rows = [&](int64_t width, float low, float high, DType type) {
        const Tensor tile = test::on_device(random.vector(512 * width, low, high), {512, width}, cpu);
        const Tensor there = tile.to(type).to(ex), all = Tensor::empty(ex, {t, width}, type);
        for (int64_t i = 0; i < t; i += 512)
            all.rows(i, std::min(t, i + 512)).copy_from(there.rows(0, std::min<int64_t>(512, t - i)));
        return all;
    };
    f.u = rows(d, -1, 1, DType::bf16), f.z = rows(d, -2, 2, DType::bf16);
    f.delta = rows(d, -6, -2, DType::f32), f.grad_y = rows(d, -1, 1, DType::f32);
    f.B = rows(16, -1, 1, DType::f32), f.C = rows(16, -1, 1, DType::f32);
    f.A = test::on_device(random.vector(d * 16, -16, -0.5f), {d, 16}, ex);
    f.D = test::on_device(random.vector(d), {d}, ex), f.bias = test::on_device(random.vector(d), {d}, ex);
    f.y = Tensor::empty(ex, {t, d}, DType::bf16);
    f.states = Tensor::empty(ex, {selective_scan_chunks(f.cu, 32), d, 16});
    f.gu = Tensor::zeros(ex, {t, d}), f.gdelta = Tensor::zeros(ex, {t, d}), f.gz = Tensor::zeros(ex, {t, d});
    f.gA = Tensor::zeros(ex, {d, 16}), f.gB = Tensor::zeros(ex, {t, 16}), f.gC = Tensor::zeros(ex, {t, 16});
    f.gD = Tensor::zeros(ex, {d}), f.gbias = Tensor::zeros(ex, {d});
    return f;
}

SelectiveScanInputs<bf16> inputs(const Buffers& f) {
    SelectiveScanInputs<bf16> in;
    in.u = f.u.view<const bf16, 2>(), in.z = f.z.view<const bf16, 2>(),
    in.delta = f.delta.view<const float, 2>();
    in.A = f.A.view<const float, 2>(), in.B = f.B.view<const float, 2>(), in.C = f.C.view<const float, 2>();
    in.D = f.D.view<const float, 1>(), in.delta_bias = f.bias.view<const float, 1>();
    in.cu_seqlens = f.cu;
    return in;
}
void forward(const Exec& ex, const Buffers& f, bool states, const SelectiveScanOptions& options) {
    selective_scan<bf16>(ex, inputs(f), f.y.view<bf16, 2>(), {},
                         states ? f.states.view<float, 3>() : View<float, 3>{}, options);
}
void backward(const Exec& ex, const Buffers& f, const SelectiveScanOptions& options) {
    SelectiveScanGradients grad{.set = {true, true, true, true, true}};
    grad.u = f.gu.view<float, 2>(), grad.delta = f.gdelta.view<float, 2>(), grad.z = f.gz.view<float, 2>();
    grad.A = f.gA.view<float, 2>(), grad.B = f.gB.view<float, 2>(), grad.C = f.gC.view<float, 2>();
    grad.D = f.gD.view<float, 1>(), grad.delta_bias = f.gbias.view<float, 1>();
    selective_scan_backward<bf16>(ex, inputs(f), f.states.view<const float, 3>(),
                                  f.grad_y.view<const float, 2>(), {}, grad, options);
}

// Median of 15 runs after 3, by events.
template <class F>
double milliseconds(const Exec& ex, const F& f) {
    cudaEvent_t begin, end;
    cuda::check(cudaEventCreate(&begin), "bench");
    cuda::check(cudaEventCreate(&end), "bench");
    std::vector<float> times;
    for (int i = 0; i < 18; ++i) {
        cuda::check(cudaEventRecord(begin, cuda::stream_of(ex)), "bench");
        f();
        cuda::check(cudaEventRecord(end, cuda::stream_of(ex)), "bench");
        cuda::check(cudaEventSynchronize(end), "bench");
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, begin, end), "bench");
        if (i >= 3) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
}

// y and gradients of a small problem against the CPU's.
void verify(const Exec& ex) {
    const Exec cpu = make_cpu_exec(0);
    const Buffers there = make(ex, 2, 96, 512), here = make(cpu, 2, 96, 512);
    for (const Exec* e : {&ex, &cpu}) {
        const Buffers& f = e == &ex ? there : here;
        forward(*e, f, true, {});
        backward(*e, f, {});
    }
    double worst = 0;
    for (const auto member : {&Buffers::gu, &Buffers::gdelta, &Buffers::gz, &Buffers::gA, &Buffers::gB,
                              &Buffers::gC, &Buffers::gD, &Buffers::gbias})
        worst = std::max(worst, test::relative_l2(test::from_device<float>(there.*member),
                                                  test::from_device<float>(here.*member)));
    const double y =
        test::relative_l2(test::from_device<bf16>(there.y), test::to_double(test::from_device<bf16>(here.y)));
    std::printf("relative error: y %.1e, gradients %.1e\n", y, worst);
    if (y > 1e-2 || worst > 1e-4) std::exit(1);
}

int run() {
    const Exec ex = make_cuda_exec();
    verify(ex);
    std::printf(
        "b d l: forward ms (no states), with states | backward ms; split in time: automatic, never, "
        "always\n");
    for (const Shape4& s : kShapes) {
        const Buffers f = make(ex, s.b, s.d, s.l);
        const double pairs = static_cast<double>(s.b * s.l * s.d);
        const double forward_floor =
                         1e3 * std::max(pairs * 16 / kExpPerSecond, pairs * 10 / kCopyBytesPerSecond),
                     backward_floor =
                         1e3 * std::max(2 * pairs * 16 / kExpPerSecond, pairs * 26 / kCopyBytesPerSecond);
        for (const auto mode : {TimeParallel::automatic, TimeParallel::never, TimeParallel::always}) {
            const SelectiveScanOptions options{.time_parallel = mode};
            const double plain = milliseconds(ex, [&] { forward(ex, f, false, options); }),
                         saved = milliseconds(ex, [&] { forward(ex, f, true, options); }),
                         back = milliseconds(ex, [&] { backward(ex, f, options); });
            std::printf(
                "%ld %ld %ld mode %d: %.3f %.3f (floor %.3f, %.0f %%; mamba_ssm %.3f: %.2fx) | %.3f (floor "
                "%.3f, %.0f %%; mamba_ssm %.3f: %.2fx)\n",
                s.b, s.d, s.l, static_cast<int>(mode), plain, saved, forward_floor,
                100 * forward_floor / plain, s.forward, s.forward / plain, back, backward_floor,
                100 * backward_floor / back, s.backward, s.backward / back);
            std::fflush(stdout);
        }
    }
    const Buffers f = make(ex, 1, 1536, 64);
    const Tensor state = Tensor::zeros(ex, {64, 1536, 16});
    const double step = milliseconds(
        ex, [&] { selective_scan_step<bf16>(ex, inputs(f), state.view<float, 3>(), f.y.view<bf16, 2>()); });
    std::printf("step, 64 sequences, d 1536: %.4f ms (floor %.4f)\n", step,
                1e3 * 64 * 1536 * (16 * 8 + 10) / kCopyBytesPerSecond);
    return 0;
}

}  // namespace
}  // namespace ssm

int main() { return ssm::run(); }
