// The GPU of the tests with the ctest label `gpu`, and moving vectors there and back.
#pragma once

#include <cstring>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"

namespace ssm::test {

// One for the whole program. Throws where there is none: these tests are run by name (tools/gpu_check.sh).
inline const Exec& cuda_exec() {
    static const Exec ex = make_cuda_exec();
    return ex;
}

template <class T>
Tensor on_device(const std::vector<T>& values, const Shape& shape, const Exec& ex = cuda_exec()) {
    const Tensor host = Tensor::empty(shape, dtype_of<T>);
    require(host.size() == static_cast<int64_t>(values.size()), "test", "{} values do not fill [{}]",
            values.size(), fmt::join(shape, ", "));
    if (!values.empty()) std::memcpy(host.raw(), values.data(), host.bytes());
    return host.to(ex);
}

template <class T>
std::vector<T> from_device(const Tensor& t) {
    const Tensor host = (t.dense() ? t : t.clone()).to_host();
    return {host.data<T>(), host.data<T>() + host.size()};
}

}  // namespace ssm::test
