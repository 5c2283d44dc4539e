// Device memory under Tensor, and the errors of a GPU.
#include <gtest/gtest.h>

#include <numeric>

#include "ssm/core/graph.h"
#include "ssm/core/prefetch.h"
#include "tests/support/cuda.h"

namespace ssm {
namespace {

Tensor counted(const Shape& shape) {
    std::vector<float> values(static_cast<size_t>(element_count(shape)));
    std::iota(values.begin(), values.end(), 1.0f);
    return Tensor::from_floats(shape, values);
}
std::vector<float> values(const Tensor& t) {
    const Tensor host = t.clone().to_host();
    return {host.data<float>(), host.data<float>() + host.size()};
}

TEST(CudaTensor, GoesThereAndBack) {
    const Exec& ex = test::cuda_exec();
    const Tensor host = counted({3, 5});
    const Tensor there = host.to(ex);
    EXPECT_EQ(there.device(), Device::cuda);
    EXPECT_EQ(values(there), values(host));
    EXPECT_EQ(values(there.columns(1, 3)), (std::vector<float>{2, 3, 7, 8, 12, 13}));
    EXPECT_EQ(values(host.columns(1, 3).to(ex)), (std::vector<float>{2, 3, 7, 8, 12, 13}));
    EXPECT_EQ(there.rows(1, 2).columns(2, 3).item(), 8.0f);
    EXPECT_EQ(there.to(ex).raw(), there.raw());
    EXPECT_EQ(host.to_host().raw(), host.raw());
}

TEST(CudaTensor, ZeroAndCopyThroughStrides) {
    const Exec& ex = test::cuda_exec();
    const Tensor a = counted({2, 3}).to(ex), b = Tensor::zeros(ex, {2, 3});
    EXPECT_EQ(values(b), std::vector<float>(6));
    b.columns(1, 3).copy_from(a.columns(0, 2));
    EXPECT_EQ(values(b), (std::vector<float>{0, 1, 2, 0, 4, 5}));
    a.columns(2, 3).fill_zero();
    EXPECT_EQ(values(a), (std::vector<float>{1, 2, 0, 4, 5, 0}));
}

TEST(CudaTensor, BlocksAreReused) {
    const Exec ex = test::cuda_exec();
    const std::byte* first = Tensor::empty(ex, {1000}).raw();
    EXPECT_EQ(Tensor::empty(ex, {1000}).raw(), first);
    const size_t before = ex.allocator->bytes_in_use();
    const Tensor held = Tensor::empty(ex, {1000});
    EXPECT_GE(ex.allocator->bytes_in_use(), before + 4000);
}

// Branches of a captured graph: joined at its end, whatever their size; results are those without them.
TEST(Prefetch, LeavesResultsAlone) {
    const Exec& ex = test::cuda_exec();
    const Tensor a = counted({3, 5}).to(ex), b = Tensor::zeros(ex, {3, 5}), c = Tensor::zeros(ex, {3, 5});
    const Tensor large = Tensor::zeros(ex, {40, 1 << 20}), odd = large.rows(0, 1).columns(0, 1021);
    const auto work = [&](const Tensor& what) {
        const Prefetch first(ex);
        b.copy_from(a);
        first.bring(ex, what);
        const Prefetch second(ex);
        c.copy_from(b);
        second.bring(ex, large);
    };
    for (const Tensor& what : {large, odd, large.rows(0, 1).columns(0, 3), large.rows(0, 0)}) {
        work(what);  // not in a capture
        const Graph graph = Graph::capture(ex, [&] { work(what); });
        for (int run = 0; run < 3; ++run) {
            b.fill_zero();
            c.fill_zero();
            graph.launch(ex);
            EXPECT_EQ(values(c), values(a));
        }
    }
}

TEST(Prefetch, ABranchOfAFailedCaptureIsForgotten) {
    const Exec& ex = test::cuda_exec();
    const Tensor a = counted({3, 5}).to(ex), b = Tensor::zeros(ex, {3, 5});
    const auto work = [&](bool fails) {
        const Prefetch prefetch(ex);
        b.copy_from(a);
        prefetch.bring(ex, a);
        if (fails) fail(ErrorCode::unsupported, "work", "stops");
    };
    EXPECT_THROW(Graph::capture(ex, [&] { work(true); }), Error);
    Graph::capture(ex, [&] { work(false); }).launch(ex);
    EXPECT_EQ(values(b), values(a));
}

TEST(CudaErrors, SayWhatIsWrong) {
    const Exec& ex = test::cuda_exec();
    const auto message = [](auto&& f) -> std::string {
        try {
            f();
        } catch (const Error& error) {
            return error.what();
        }
        return "no error";
    };
    EXPECT_EQ(message([&] { Tensor::empty(ex, {1}).data<float>(); }),
              "[tensor] the tensor is on the GPU where the CPU reads it");
    const std::string full = message([&] { Tensor::empty(ex, {int64_t{1} << 42}); });
    EXPECT_EQ(full.rfind("[memory] the GPU is full: 17592186.0 MB are needed, ", 0), 0u) << full;
    EXPECT_EQ(values(counted({2}).to(ex)), (std::vector<float>{1, 2}));  // and it goes on
    EXPECT_EQ(
        message([] { make_cuda_exec(1000); }).rfind("[device] there is no GPU 1000: this machine has ", 0),
        0u);
}

}  // namespace
}  // namespace ssm
