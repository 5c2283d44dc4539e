// The selective scan on a GPU at the shapes that mamba_ssm's time is known for (bf16, n 16, D, z, delta_bias,
// softplus). Floor: 16 exponentials per clock and multiprocessor, each counted once forward and twice
// backward, or bytes at the rate of a copy, whichever takes longer. Refuses to time a wrong answer. With the
// index of a shape (-2: all) and a number of runs it times that shape alone, time split as `automatic`
// decides: for a profiler.
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
    DType type = DType::bf16;  // of the activations
};

Buffers make(const Exec& ex, int64_t b, int64_t d, int64_t l, DType activations = DType::bf16) {
    test::Random random(1);
    Buffers f;
    f.type = activations;
    for (int64_t i = 0; i <= b; ++i) f.cu.push_back(i * l);
    const int64_t t = b * l;
    const Exec cpu = make_cpu_exec(1);
    // Random numbers of a tile repeated: drawing all of them would take longer than the measurement.
    const auto rows = [&](int64_t width, float low, float high, DType type) {
        const Tensor tile = test::on_device(random.vector(512 * width, low, high), {512, width}, cpu);
        const Tensor there = tile.to(DType::bf16).to(type).to(ex), all = Tensor::empty(ex, {t, width}, type);
        for (int64_t i = 0; i < t; i += 512)
            all.rows(i, std::min(t, i + 512)).copy_from(there.rows(0, std::min<int64_t>(512, t - i)));
        return all;
    };
    f.u = rows(d, -1, 1, f.type), f.z = rows(d, -2, 2, f.type);
    f.delta = rows(d, -6, -2, f.type), f.grad_y = rows(d, -1, 1, f.type);
    f.B = rows(16, -1, 1, DType::f32), f.C = rows(16, -1, 1, DType::f32);
    f.A = test::on_device(random.vector(d * 16, -16, -0.5f), {d, 16}, ex);
    f.D = test::on_device(random.vector(d), {d}, ex), f.bias = test::on_device(random.vector(d), {d}, ex);
    f.y = Tensor::empty(ex, {t, d}, f.type);
    f.states = Tensor::empty(ex, {selective_scan_chunks(f.cu, 32), d, 16});
    f.gu = Tensor::zeros(ex, {t, d}, f.type), f.gdelta = Tensor::zeros(ex, {t, d}, f.type),
    f.gz = Tensor::zeros(ex, {t, d}, f.type);
    f.gA = Tensor::zeros(ex, {d, 16}), f.gB = Tensor::zeros(ex, {t, 16}), f.gC = Tensor::zeros(ex, {t, 16});
    f.gD = Tensor::zeros(ex, {d}), f.gbias = Tensor::zeros(ex, {d});
    return f;
}

template <class T>
SelectiveScanInputs<T> inputs(const Buffers& f) {
    SelectiveScanInputs<T> in;
    in.u = f.u.view<const T, 2>(), in.z = f.z.view<const T, 2>();
    in.delta = f.delta.view<const T, 2>(), in.A = f.A.view<const float, 2>();
    in.B = f.B.view<const float, 2>(), in.C = f.C.view<const float, 2>();
    in.D = f.D.view<const float, 1>(), in.delta_bias = f.bias.view<const float, 1>();
    in.cu_seqlens = f.cu;
    return in;
}
template <class T>
void forward(const Exec& ex, const Buffers& f, bool states, const SelectiveScanOptions& options) {
    selective_scan<T>(ex, inputs<T>(f), f.y.view<T, 2>(), {},
                      states ? f.states.view<float, 3>() : View<float, 3>{}, options);
}
template <class T>
void backward(const Exec& ex, const Buffers& f, const SelectiveScanOptions& options) {
    SelectiveScanGradients<T> grad{.set = {true, true, true, true, true}};
    grad.u = f.gu.view<T, 2>(), grad.delta = f.gdelta.view<T, 2>(), grad.z = f.gz.view<T, 2>();
    grad.A = f.gA.view<float, 2>(), grad.B = f.gB.view<float, 2>(), grad.C = f.gC.view<float, 2>();
    grad.D = f.gD.view<float, 1>(), grad.delta_bias = f.gbias.view<float, 1>();
    selective_scan_backward<T>(ex, inputs<T>(f), f.states.view<const float, 3>(), f.grad_y.view<const T, 2>(),
                               {}, grad, options);
}

constexpr int kEverything = -1;
int runs = 18;

// Median of all runs but the first 3, by events.
template <class F>
double milliseconds(const Exec& ex, const F& f) {
    cudaEvent_t begin, end;
    cuda::check(cudaEventCreate(&begin), "bench");
    cuda::check(cudaEventCreate(&end), "bench");
    std::vector<float> times;
    for (int i = 0; i < runs; ++i) {
        cuda::check(cudaEventRecord(begin, cuda::stream_of(ex)), "bench");
        f();
        cuda::check(cudaEventRecord(end, cuda::stream_of(ex)), "bench");
        cuda::check(cudaEventSynchronize(end), "bench");
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, begin, end), "bench");
        if (i >= 3 || i == runs - 1) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
}

// y and gradients of a small problem against the CPU's in f32.
void verify(const Exec& ex) {
    const Exec cpu = make_cpu_exec(0);
    const Buffers there = make(ex, 2, 96, 512), here = make(cpu, 2, 96, 512, DType::f32);
    forward<bf16>(ex, there, true, {});
    backward<bf16>(ex, there, {});
    forward<float>(cpu, here, true, {});
    backward<float>(cpu, here, {});
    const auto error = [&](Tensor Buffers::*member) {
        return test::relative_l2(test::from_device<float>((there.*member).to_host().to(DType::f32)),
                                 test::from_device<float>(here.*member));
    };
    double worst = 0;
    for (const auto member : {&Buffers::gA, &Buffers::gB, &Buffers::gC, &Buffers::gD, &Buffers::gbias})
        worst = std::max(worst, error(member));
    const double rounded =
        std::max({error(&Buffers::y), error(&Buffers::gu), error(&Buffers::gdelta), error(&Buffers::gz)});
    std::printf("relative error: y and gradients in bf16 %.1e, gradients in f32 %.1e\n", rounded, worst);
    if (rounded > 1e-2 || worst > 4e-3) std::exit(1);
}

int run(int only) {
    const Exec ex = make_cuda_exec();
    verify(ex);
    std::printf(
        "b d l: forward ms (no states), with states | backward ms; split in time: automatic, never, "
        "always\n");
    for (int i = 0; i < 4; ++i) {
        if (only >= 0 && i != only) continue;
        const Shape4& s = kShapes[i];
        const Buffers f = make(ex, s.b, s.d, s.l);
        const double pairs = static_cast<double>(s.b * s.l * s.d);
        const double forward_floor =
                         1e3 * std::max(pairs * 16 / kExpPerSecond, pairs * 8 / kCopyBytesPerSecond),
                     backward_floor =
                         1e3 * std::max(2 * pairs * 16 / kExpPerSecond, pairs * 14 / kCopyBytesPerSecond);
        for (const auto mode : {TimeParallel::automatic, TimeParallel::never, TimeParallel::always}) {
            if (only != kEverything && mode != TimeParallel::automatic) continue;
            const SelectiveScanOptions options{.time_parallel = mode};
            const double plain = milliseconds(ex, [&] { forward<bf16>(ex, f, false, options); }),
                         saved = milliseconds(ex, [&] { forward<bf16>(ex, f, true, options); }),
                         back = milliseconds(ex, [&] { backward<bf16>(ex, f, options); });
            std::printf(
                "%ld %ld %ld mode %d: %.3f %.3f (floor %.3f, %.0f %%; mamba_ssm %.3f: %.2fx) | %.3f (floor "
                "%.3f, %.0f %%; mamba_ssm %.3f: %.2fx)\n",
                s.b, s.d, s.l, static_cast<int>(mode), plain, saved, forward_floor,
                100 * forward_floor / plain, s.forward, s.forward / plain, back, backward_floor,
                100 * backward_floor / back, s.backward, s.backward / back);
            std::fflush(stdout);
        }
    }
    if (only != kEverything) return 0;
    // States that hardly decay: the passes before a split must read whole segments.
    for (const Shape4& s : kShapes) {
        if (s.b > 1) continue;
        Buffers f = make(ex, s.b, s.d, s.l);
        f.A = test::on_device(test::Random(2).vector(s.d * 16, -1e-3f, -1e-5f), {s.d, 16}, ex);
        const double plain = milliseconds(ex, [&] { forward<bf16>(ex, f, false, {}); });
        forward<bf16>(ex, f, true, {});
        const double back = milliseconds(ex, [&] { backward<bf16>(ex, f, {}); });
        std::printf("%ld %ld %ld slow states: %.3f | %.3f\n", s.b, s.d, s.l, plain, back);
    }
    const Buffers f = make(ex, 1, 1536, 64);
    const Tensor state = Tensor::zeros(ex, {64, 1536, 16});
    const double step = milliseconds(ex, [&] {
        selective_scan_step<bf16>(ex, inputs<bf16>(f), state.view<float, 3>(), f.y.view<bf16, 2>());
    });
    std::printf("step, 64 sequences, d 1536: %.4f ms (floor %.4f)\n", step,
                1e3 * 64 * 1536 * (16 * 8 + 8) / kCopyBytesPerSecond);
    return 0;
}

}  // namespace
}  // namespace ssm

int main(int argc, char** argv) {
    if (argc > 2) ssm::runs = std::atoi(argv[2]);
    return ssm::run(argc > 1 ? std::atoi(argv[1]) : ssm::kEverything);
}
