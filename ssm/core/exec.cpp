#include "ssm/core/exec.h"

#include <omp.h>

namespace ssm {

Exec make_cpu_exec(int threads) {
    Exec ex;
    ex.threads = threads > 0 ? threads : omp_get_num_procs();
    omp_set_num_threads(ex.threads);  // oneDNN asks OpenMP
    return ex;
}

}  // namespace ssm
