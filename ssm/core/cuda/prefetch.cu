#include "ssm/core/prefetch.h"

#include <algorithm>

#include "ssm/core/cuda/launch.cuh"
#include "ssm/core/cuda/numbers.cuh"

namespace ssm {
namespace {

constexpr std::string_view kWhere = "prefetch";
// Fewer blocks ask too slowly; with many more all is asked for at once, and what others read waits behind it
// (norm_linear's README).
constexpr int kBlocks = 16, kPiece = 4096 /* bytes of a request */, kShareOfCache = 4;

__global__ void __launch_bounds__(cuda::kWarp) BringToL2(const std::byte* p, int64_t bytes) {
    const int64_t step = int64_t{gridDim.x} * cuda::kWarp * kPiece;
    for (int64_t at = (int64_t{blockIdx.x} * cuda::kWarp + threadIdx.x) * kPiece; at < bytes; at += step)
        cuda::prefetch_l2(p + at, static_cast<uint32_t>(min(bytes - at, int64_t{kPiece})));
}

std::shared_ptr<void> new_event() {
    cudaEvent_t event = nullptr;
    cuda::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), kWhere);
    return {event, [](void* e) { cudaEventDestroy(static_cast<cudaEvent_t>(e)); }};
}

void wait_for(cudaStream_t stream, const std::shared_ptr<void>& event) {
    cuda::check(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event.get()), 0), kWhere);
}

std::shared_ptr<void> mark(cudaStream_t stream) {
    std::shared_ptr<void> event = new_event();
    cuda::check(cudaEventRecord(static_cast<cudaEvent_t>(event.get()), stream), kWhere);
    return event;
}

}  // namespace

Prefetch::Prefetch(const Exec& ex) {
    if (ex.device != Device::cuda) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(cuda::stream_of(ex), &status), kWhere);
    if (status == cudaStreamCaptureStatusActive) mark_ = mark(cuda::stream_of(ex));
}

void Prefetch::bring(const Exec& ex, const Tensor& t) const {
    if (mark_ == nullptr) return;
    const auto bytes =
        std::min(static_cast<int64_t>(t.bytes()), ex.cuda->cache_bytes() / kShareOfCache) / 16 * 16;
    if (bytes == 0 || reinterpret_cast<uintptr_t>(t.raw()) % 16 != 0) return;
    const cudaStream_t branch = ex.cuda->branch();
    wait_for(branch, mark_);
    BringToL2<<<kBlocks, cuda::kWarp, 0, branch>>>(t.raw(), bytes);
    cuda::check_launch(kWhere);
    ex.cuda->branched = true;
}

namespace cuda {

void join_branch(const Exec& ex) {
    if (ex.cuda->branched) wait_for(stream_of(ex), mark(ex.cuda->branch()));
    ex.cuda->branched = false;
}

}  // namespace cuda
}  // namespace ssm
