// The GPU of the tests with the ctest label `gpu`.
#pragma once

#include "ssm/core/exec.h"

namespace ssm::test {

// One for the whole program. Throws where there is none: these tests are run by name (tools/gpu_check.sh).
inline const Exec& cuda_exec() {
    static const Exec ex = make_cuda_exec();
    return ex;
}

}  // namespace ssm::test
