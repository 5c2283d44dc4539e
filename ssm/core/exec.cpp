#include "ssm/core/exec.h"

#include <omp.h>

#include "ssm/core/error.h"
#include "ssm/core/graph.h"
#include "ssm/core/machine.h"
#include "ssm/core/prefetch.h"

namespace ssm {

Exec make_cpu_exec(int threads) {
    Exec ex;
    ex.threads = threads > 0 ? threads : omp_get_num_procs();
    omp_set_num_threads(ex.threads);  // oneDNN asks OpenMP
    return ex;
}

#if !defined(SSM_HAS_CUDA)
Exec make_cuda_exec(int) {
    fail(ErrorCode::unsupported, "device", "this build has no CUDA; use --device cpu");
}
void synchronize(const Exec&) {}
Graph Graph::capture(const Exec&, const std::function<void()>&) {
    fail(ErrorCode::unsupported, "graph", "this build has no CUDA");
}
void Graph::launch(const Exec&) const {}
Prefetch::Prefetch(const Exec&) {}
void Prefetch::bring(const Exec&, const Tensor&) const {}
std::vector<Gpu> list_gpus(std::string& why) {
    why = "this build has no CUDA";
    return {};
}
#endif

}  // namespace ssm
