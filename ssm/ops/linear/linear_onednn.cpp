// Matrix products by oneDNN's matmul primitive (on AVX-512: its jit "brgemm" kernels).
//
// A primitive is a compiled kernel for one shape, set of strides, types and number of threads. Making one
// costs 0.3 to 1 ms the first time, so they are remembered: those of a packed weight beside it, those of
// plain products per thread. That memory is a memo of pure functions: it never changes a result.
#include <dnnl.hpp>

#include <omp.h>

#include <cstring>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ssm/ops/linear/linear_impl.h"

namespace ssm {
namespace {

using linear_detail::Matrix;
using linear_detail::Product;
using Memory = dnnl::memory;

const dnnl::engine& engine() {
    static const dnnl::engine instance(dnnl::engine::kind::cpu, 0);
    return instance;
}

// oneDNN takes its threads from OpenMP's setting, a variable of the calling thread.
class ThreadScope {
public:
    explicit ThreadScope(const Exec& ex)
        : before_(omp_get_max_threads()), threads_(omp_in_parallel() != 0 ? 1 : ex.threads) {
        if (threads_ != before_) omp_set_num_threads(threads_);
    }
    ~ThreadScope() {
        if (threads_ != before_) omp_set_num_threads(before_);
    }
    ThreadScope(const ThreadScope&) = delete;
    ThreadScope& operator=(const ThreadScope&) = delete;
    int threads() const { return threads_; }

private:
    int before_, threads_;
};

Memory::data_type type_of(DType t) {
    return t == DType::f32 ? Memory::data_type::f32 : Memory::data_type::bf16;
}

Memory::desc describe(int64_t rows, int64_t columns, const Matrix& m) {
    const Memory::dims strides = m.transpose ? Memory::dims{1, m.stride} : Memory::dims{m.stride, 1};
    return {{rows, columns}, type_of(m.dtype), strides};
}

// What distinguishes one primitive from another.
struct Key {
    int64_t m, n, k, a_stride, b_stride, c_stride;
    float alpha, beta;
    int32_t threads;
    uint8_t a_type, c_type, a_transpose, b_transpose;
    uint32_t bias;

    Key(const Product& p, int thread_count)
        : m(p.m),
          n(p.n),
          k(p.k),
          a_stride(p.a.stride),
          b_stride(p.b.stride),
          c_stride(p.c_stride),
          alpha(p.alpha),
          beta(p.beta),
          threads(thread_count),
          a_type(static_cast<uint8_t>(p.a.dtype)),
          c_type(static_cast<uint8_t>(p.c_dtype)),
          a_transpose(p.a.transpose ? 1 : 0),
          b_transpose(p.b.transpose ? 1 : 0),
          bias(p.bias != nullptr ? 1 : 0) {}
    bool operator==(const Key&) const = default;
};

struct KeyHash {
    size_t operator()(const Key& key) const {
        size_t h = 0;
        for (const int64_t part : {key.m, key.n, key.k, key.a_stride, key.b_stride, key.c_stride}) {
            h = (h ^ static_cast<size_t>(part)) * 0x9e3779b97f4a7c15u;
            h ^= h >> 32;
        }
        const auto rest = static_cast<size_t>(key.threads) << 5 | key.a_transpose << 4 |
                          key.b_transpose << 3 | key.bias << 2 | (key.a_type != 0 ? 2 : 0) |
                          (key.c_type != 0 ? 1 : 0);
        return (h ^ rest) * 0x9e3779b97f4a7c15u ^ std::bit_cast<uint32_t>(key.beta);
    }
};

struct Kernel {
    dnnl::matmul primitive;
    Memory::desc a, b, c, bias;
    size_t scratchpad;
};

// The kernel for p; `b` overrides the description of B (format any, or a packed one).
Kernel make_kernel(const Product& p, const Memory::desc& b) {
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (p.alpha != 1.0f) attr.set_output_scales(0, {p.alpha});
    if (p.beta != 0.0f) {
        dnnl::post_ops ops;
        ops.append_sum(p.beta);
        attr.set_post_ops(ops);
    }
    const Memory::desc a = describe(p.m, p.k, p.a);
    const Memory::desc c({p.m, p.n}, type_of(p.c_dtype), Memory::dims{p.c_stride, 1});
    const Memory::desc bias = p.bias != nullptr
                                  ? Memory::desc({1, p.n}, Memory::data_type::f32, Memory::dims{p.n, 1})
                                  : Memory::desc();
    const dnnl::matmul::desc op =
        p.bias != nullptr ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
    const dnnl::matmul::primitive_desc pd(op, attr, engine());
    return {dnnl::matmul(pd), a, pd.weights_desc(), c, bias, pd.scratchpad_desc().get_size()};
}

Memory memory_at(const Memory::desc& desc, const void* data) {
    return {desc, engine(), const_cast<void*>(data)};
}

void execute(const Exec& ex, const Kernel& kernel, const Product& p, const void* b) {
    const Scratch<std::byte> scratchpad(ex, kernel.scratchpad);
    dnnl::stream stream(engine());
    std::unordered_map<int, Memory> arguments;
    arguments.reserve(5);
    arguments.emplace(DNNL_ARG_SRC, memory_at(kernel.a, p.a.data));
    arguments.emplace(DNNL_ARG_WEIGHTS, memory_at(kernel.b, b));
    arguments.emplace(DNNL_ARG_DST, memory_at(kernel.c, p.c));
    if (p.bias != nullptr) arguments.emplace(DNNL_ARG_BIAS, memory_at(kernel.bias, p.bias));
    if (kernel.scratchpad > 0) {
        const Memory::desc desc({static_cast<int64_t>(kernel.scratchpad)}, Memory::data_type::u8,
                                Memory::dims{1});
        arguments.emplace(DNNL_ARG_SCRATCHPAD, memory_at(desc, scratchpad.data()));
    }
    kernel.primitive.execute(stream, arguments);
    stream.wait();
}

[[noreturn]] void rethrow(const dnnl::error& e, const Product& p) {
    fail(ErrorCode::unsupported, "linear", "oneDNN refuses the product [{} {}] x [{} {}] of {}: {}", p.m, p.k,
         p.k, p.n, name_of(p.a.dtype), e.what());
}

constexpr size_t kRemembered = 512;

// The older kernels behind dnnl_sgemm copy plain operands better than the primitive does, above all a
// transposed A (README.md): for the products of the backward pass, and of the forward pass where the weight
// is the larger operand. They pay for large products, and have no bias.
bool sgemm_is_faster(const Product& p) {
    constexpr int64_t least_work = int64_t{1} << 22, least_columns = 32;
    if (p.a.dtype != DType::f32 || p.c_dtype != DType::f32 || p.bias != nullptr) return false;
    if (omp_in_parallel() != 0 || p.m * p.n * p.k < least_work) return false;
    if (p.a.transpose) return !p.b.transpose;
    return p.b.transpose ? p.n >= p.k : p.n >= least_columns;
}

}  // namespace

// The blocked copies of one weight and the kernels that read them. Guarded by the State's mutex.
class OneDnnWeight {
public:
    struct Entry {
        std::shared_ptr<const Kernel> kernel;
        const void* packed;  // the B that it reads
    };

    Entry find(const Product& p, int threads) {
        const Key key(p, threads);
        auto it = kernels_.find(key);
        if (it == kernels_.end()) {
            if (kernels_.size() >= kRemembered) kernels_.clear();
            it = kernels_.emplace(key, make(p)).first;
        }
        return it->second;
    }

private:
    struct Copy {
        Memory::desc desc;
        Tensor bytes;
    };

    Entry make(const Product& p) {
        const Memory::desc any({p.k, p.n}, type_of(p.b.dtype), Memory::format_tag::any);
        auto kernel = std::make_shared<const Kernel>(make_kernel(p, any));
        for (const Copy& copy : copies_) {
            if (copy.desc == kernel->b) return {kernel, copy.bytes.raw()};
        }
        Copy copy{kernel->b, Tensor::empty(Shape{static_cast<int64_t>(kernel->b.get_size())}, DType::u8)};
        Memory from = memory_at(describe(p.k, p.n, p.b), p.b.data);
        Memory to = memory_at(copy.desc, copy.bytes.raw());
        dnnl::stream stream(engine());
        dnnl::reorder(from, to).execute(stream, from, to);
        stream.wait();
        copies_.push_back(std::move(copy));
        return {kernel, copies_.back().bytes.raw()};
    }

    std::vector<Copy> copies_;
    std::unordered_map<Key, Entry, KeyHash> kernels_;
};

namespace linear_detail {

void product_onednn(const Exec& ex, const Product& p) {
    if (sgemm_is_faster(p)) {
        const ThreadScope scope(ex);
        const dnnl_status_t status =
            dnnl_sgemm(p.a.transpose ? 'T' : 'N', p.b.transpose ? 'T' : 'N', p.m, p.n, p.k, p.alpha,
                       static_cast<const float*>(p.a.data), p.a.stride, static_cast<const float*>(p.b.data),
                       p.b.stride, p.beta, static_cast<float*>(p.c), p.c_stride);
        if (status != dnnl_success) rethrow(dnnl::error(status, "dnnl_sgemm"), p);
        return;
    }
    thread_local std::unordered_map<Key, Kernel, KeyHash> kernels;
    try {
        const ThreadScope scope(ex);
        const Key key(p, scope.threads());
        auto it = kernels.find(key);
        if (it == kernels.end()) {
            if (kernels.size() >= kRemembered) kernels.clear();
            it = kernels.emplace(key, make_kernel(p, describe(p.k, p.n, p.b))).first;
        }
        execute(ex, it->second, p, p.b.data);
    } catch (const dnnl::error& e) {
        rethrow(e, p);
    }
}

void product_packed(const Exec& ex, const Product& p, PackedWeight::State& weight) {
    try {
        const ThreadScope scope(ex);
        OneDnnWeight::Entry found;
        {
            const std::lock_guard lock(weight.mutex);
            if (!weight.packed) weight.packed = std::make_shared<OneDnnWeight>();
            found = weight.packed->find(p, scope.threads());
        }
        execute(ex, *found.kernel, p, found.packed);
    } catch (const dnnl::error& e) {
        rethrow(e, p);
    }
}

bool onednn_has_fast_bf16() {
    static const bool fast = [] {
        const int isa = static_cast<int>(dnnl::get_effective_cpu_isa());
        const int avx512 = static_cast<int>(dnnl::cpu_isa::avx512_core);
        return (isa & avx512) == avx512;
    }();
    return fast;
}

}  // namespace linear_detail
}  // namespace ssm
