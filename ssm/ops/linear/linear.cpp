#include "ssm/ops/linear/linear.h"

#include "ssm/ops/elementwise/elementwise.h"
#include "ssm/ops/linear/linear_impl.h"

namespace ssm {
namespace build {
#ifdef SSM_HAS_ONEDNN
constexpr bool has_onednn = true;
#else
constexpr bool has_onednn = false;
#endif
}  // namespace build

bool linear_detail::products_run_in_bf16() {
    if constexpr (build::has_onednn) return onednn_has_fast_bf16();
    return true;
}

namespace {

using namespace linear_detail;

constexpr std::string_view kOp = "linear";

void require_matrix(std::string_view op, std::string_view name, std::string_view letters, const Tensor& t,
                    int64_t rows, int64_t columns) {
    require(static_cast<bool>(t), op, "`{}` is absent", name);
    require(t.dtype() == DType::f32 || t.dtype() == DType::bf16, op, "`{}` must be f32 or bf16 but is {}",
            name, name_of(t.dtype()));
    require(t.rank() == 2 && (rows < 0 || t.dim(0) == rows) && (columns < 0 || t.dim(1) == columns), op,
            "`{}` must be [{}] = [{}, {}] but is {}", name, letters, rows < 0 ? "any" : std::to_string(rows),
            columns < 0 ? "any" : std::to_string(columns), to_string(t.shape()));
}

Matrix matrix_of(const Tensor& t) { return {t.raw(), t.dtype(), t.stride(), false}; }
Matrix matrix_of(View<const float, 2> v) { return {v.data, DType::f32, v.stride, false}; }

bool on_gpu(const Exec& ex) { return kHasCuda && ex.device == Device::cuda; }

// Of the two devices'.
void convert(const Exec& ex, int64_t rows, int64_t columns, const Matrix& from, void* to, DType to_dtype,
             int64_t to_stride) {
    if constexpr (kHasCuda) {
        if (on_gpu(ex)) return cuda::convert_rows(ex, rows, columns, from, to, to_dtype, to_stride);
    }
    convert_rows(ex, rows, columns, from, to, to_dtype, to_stride);
}

void column_sums(const Exec& ex, const Tensor& a, float* sum) {
    if constexpr (kHasCuda) {
        if (on_gpu(ex)) return cuda::add_column_sums(ex, a.dim(0), a.dim(1), matrix_of(a), sum);
    }
    add_column_sums(ex, a.view<const float, 2>(), sum);
}

Matrix transposed(Matrix m) {
    m.transpose = !m.transpose;
    return m;
}

// m in `dtype`: itself, or a rounded copy held by `storage`, whose rows a GPU's products can read as they
// are.
Matrix converted(const Exec& ex, const Matrix& m, int64_t rows, int64_t columns, DType dtype,
                 Tensor& storage) {
    if (m.dtype == dtype) return m;
    const int64_t stride = on_gpu(ex) ? (columns + 7) / 8 * 8 : columns;
    storage = Tensor::empty(ex, {rows, stride}, dtype);
    convert(ex, rows, columns, m, storage.raw(), dtype, stride);
    return {storage.raw(), dtype, stride, false};
}

// Degenerate products, then the engine that this build has. `packed`: B is this weight, transposed.
void product(const Exec& ex, const Product& p, PackedWeight::State* packed = nullptr) {
    if (p.m == 0 || p.n == 0) return;
    if constexpr (kHasCuda) {
        if (on_gpu(ex)) return cuda::product(ex, p);
    }
    if constexpr (build::has_onednn) {
        if (p.k > 0) return packed != nullptr ? product_packed(ex, p, *packed) : product_onednn(ex, p);
    }
    product_plain(ex, p);
}

bool products_run_in_bf16(const Exec& ex) { return on_gpu(ex) || linear_detail::products_run_in_bf16(); }

// The dtype in which x W^T is computed.
DType compute_type(const Exec& ex, const Tensor& x, const Tensor& weight, bool training) {
    if (!products_run_in_bf16(ex)) return DType::f32;
    if (weight.dtype() == DType::bf16) return DType::bf16;
    const bool round =
        training && ex.matmul == MatmulPrecision::bf16 && (x.dtype() == DType::f32 || on_gpu(ex));
    return round ? DType::bf16 : DType::f32;
}

void check_linear(const Tensor& x, const Tensor& weight, View<const float, 1> bias, const Tensor& y) {
    require_matrix(kOp, "weight", "o i", weight, -1, -1);
    const int64_t o = weight.dim(0), i = weight.dim(1);
    require_matrix(kOp, "x", "t i", x, -1, i);
    require_matrix(kOp, "y", "t o", y, x.dim(0), o);
    require_shape_if(kOp, "bias", "o", bias, {o});
    require(!bias || bias.stride == 1 || o <= 1, kOp, "`bias` must be dense");
    require(y.dtype() == DType::f32 || x.dtype() == DType::bf16 || weight.dtype() == DType::bf16, kOp,
            "`y` must be f32 when `x` and `weight` are f32");
}

int64_t few_rows_limit(const Exec& ex, const Tensor& weight, bool packed) {
    if (on_gpu(ex)) return few_rows_on_gpu(weight);
    return build::has_onednn && packed ? kFewRowsPacked : kFewRowsPlain;
}

void run_few_rows(const Exec& ex, const Tensor& x, const Tensor& weight, View<const float, 1> bias,
                  const Tensor& y) {
    const FewRows args{.t = x.dim(0),
                       .i = x.dim(1),
                       .o = weight.dim(0),
                       .x = matrix_of(x),
                       .weight = matrix_of(weight),
                       .bias = bias.data,
                       .y = y.raw(),
                       .y_dtype = y.dtype(),
                       .y_stride = y.stride()};
    if constexpr (kHasCuda) {
        if (on_gpu(ex)) return cuda::few_rows(ex, args);
    }
    few_rows(ex, args);
}

// The weight as [i o]^T in the compute type, the product, and y in its own type.
void run(const Exec& ex, const Tensor& x, const Tensor& weight, View<const float, 1> bias, const Tensor& y,
         DType compute, PackedWeight::State* packed) {
    const int64_t t = x.dim(0), i = weight.dim(1), o = weight.dim(0);
    Tensor x_copy, weight_copy, y_copy;
    Product p;
    p.m = t;
    p.n = o;
    p.k = i;
    p.a = converted(ex, matrix_of(x), t, i, compute, x_copy);
    p.b = transposed(converted(ex, matrix_of(weight), o, i, compute, weight_copy));
    p.bias = bias.data;
    const bool direct = y.dtype() == DType::f32 || compute == DType::bf16;
    if (!direct) y_copy = Tensor::empty(ex, {t, o});
    const Tensor& out = direct ? y : y_copy;
    p.c = out.raw();
    p.c_dtype = out.dtype();
    p.c_stride = out.stride();
    product(ex, p, weight_copy ? nullptr : packed);
    if (!direct) convert(ex, t, o, matrix_of(out), y.raw(), y.dtype(), y.stride());
}

void linear_any(const Exec& ex, const Tensor& x, const Tensor& weight, View<const float, 1> bias,
                const Tensor& y, PackedWeight::State* packed) {
    require_device(kOp, ex);
    check_linear(x, weight, bias, y);
    if (x.dim(0) <= few_rows_limit(ex, weight, packed != nullptr)) {
        if (y.size() > 0) run_few_rows(ex, x, weight, bias, y);
        return;
    }
    run(ex, x, weight, bias, y, compute_type(ex, x, weight, packed == nullptr), packed);
}

void check_backward(const Exec& ex, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                    const Tensor& grad_x, View<float, 2> grad_weight, View<float, 1> grad_bias) {
    constexpr std::string_view op = "linear_backward";
    require_device(op, ex);
    require_matrix(op, "weight", "o i", weight, -1, -1);
    const int64_t o = weight.dim(0), i = weight.dim(1);
    require_matrix(op, "x", "t i", x, -1, i);
    const int64_t t = x.dim(0);
    require_matrix(op, "grad_y", "t o", grad_y, t, o);
    if (grad_x) {
        require_matrix(op, "grad_x", "t i", grad_x, t, i);
        require(grad_x.dtype() == x.dtype(), op, "`grad_x` must have x's type, {}, but is {}",
                name_of(x.dtype()), name_of(grad_x.dtype()));
    }
    require_shape_if(op, "grad_weight", "o i", grad_weight, {o, i});
    require_shape_if(op, "grad_bias", "o", grad_bias, {o});
    require(!grad_bias || grad_bias.stride == 1 || o <= 1, op, "`grad_bias` must be dense");
    for (const Tensor* operand : {&grad_y, &x, &weight}) {
        if (!on_gpu(ex) && operand->dtype() != DType::f32)
            fail(ErrorCode::unsupported, op, "gradients of bf16 activations need a GPU");
    }
}

}  // namespace

PackedWeight::PackedWeight(Tensor weight) {
    require_matrix(kOp, "weight", "o i", weight, -1, -1);
    require(weight.dense(), kOp, "`weight` must be dense to be packed");
    state_ = std::make_shared<State>(std::move(weight));
}

const Tensor& PackedWeight::weight() const { return state_->weight; }

bool large_on_gpu(const Tensor& weight) {
    constexpr int64_t kBytes = int64_t{8} << 20, kRowBytes = 2 << 10;
    const int64_t row = weight.dim(1) * static_cast<int64_t>(size_of(weight.dtype()));
    return row >= kRowBytes && weight.dim(0) * row >= kBytes;
}

int64_t few_rows_on_gpu(const Tensor& weight) {
    if (weight.dtype() == DType::f32) return 8;
    return large_on_gpu(weight) ? 2 : 4;
}

void linear(const Exec& ex, const Tensor& x, const PackedWeight& weight, View<const float, 1> bias,
            const Tensor& y) {
    require(static_cast<bool>(weight), kOp, "`weight` is absent");
    linear_any(ex, x, weight.weight(), bias, y, &weight.state());
}

void linear(const Exec& ex, const Tensor& x, const Tensor& weight, View<const float, 1> bias,
            const Tensor& y) {
    linear_any(ex, x, weight, bias, y, nullptr);
}

void linear_add(const Exec& ex, const Tensor& x, const PackedWeight& weight, View<const float, 1> bias,
                View<float, 2> y) {
    require(static_cast<bool>(weight), kOp, "`weight` is absent");
    const Tensor& w = weight.weight();
    require_shape(kOp, "y", "t o", y, {x.dim(0), w.dim(0)});
    if constexpr (kHasCuda) {
        if (on_gpu(ex) && !bias && x.dtype() == w.dtype() && x.dim(0) > few_rows_limit(ex, w, true)) {
            require_matrix(kOp, "x", "t i", x, -1, w.dim(1));
            return product(ex, {.m = x.dim(0),
                                .n = w.dim(0),
                                .k = w.dim(1),
                                .a = matrix_of(x),
                                .b = transposed(matrix_of(w)),
                                .c = y.data,
                                .c_stride = y.stride,
                                .beta = 1.0f});
        }
    }
    const Tensor sum = Tensor::empty(ex, {x.dim(0), w.dim(0)});
    linear(ex, x, weight, bias, sum);
    accumulate(ex, sum.view<const float, 2>(), y);
}

void linear_backward(const Exec& ex, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                     const Tensor& grad_x, View<float, 2> grad_weight, View<float, 1> grad_bias,
                     LinearBackwardSet set) {
    check_backward(ex, grad_y, x, weight, grad_x, grad_weight, grad_bias);
    const int64_t t = x.dim(0), o = weight.dim(0), i = weight.dim(1);
    if (grad_bias) column_sums(ex, grad_y, grad_bias.data);
    const bool round =
        weight.dtype() == DType::bf16 || (ex.matmul == MatmulPrecision::bf16 && products_run_in_bf16(ex));
    const DType compute = round ? DType::bf16 : DType::f32;
    Tensor grad_copy, other_copy;
    const Matrix g = grad_x || grad_weight ? converted(ex, matrix_of(grad_y), t, o, compute, grad_copy)
                                           : matrix_of(grad_y);
    if (grad_x) {
        const Matrix w = converted(ex, matrix_of(weight), o, i, compute, other_copy);
        product(ex, {.m = t,
                     .n = i,
                     .k = o,
                     .a = g,
                     .b = w,
                     .c = grad_x.raw(),
                     .c_dtype = grad_x.dtype(),
                     .c_stride = grad_x.stride(),
                     .beta = set.x ? 0.0f : 1.0f});
    }
    if (grad_weight) {
        const Matrix rows = converted(ex, matrix_of(x), t, i, compute, other_copy);
        product(ex, {.m = o,
                     .n = i,
                     .k = t,
                     .a = transposed(g),
                     .b = rows,
                     .c = grad_weight.data,
                     .c_stride = grad_weight.stride,
                     .beta = set.weight ? 0.0f : 1.0f});
    }
}

void matmul(const Exec& ex, View<const float, 2> a, View<const float, 2> b, View<float, 2> c,
            const MatmulOptions& options) {
    constexpr std::string_view op = "matmul";
    require_device(op, ex);
    require(a && b && c, op, "an operand is absent");
    const auto rows = [](const auto& v, bool transpose) { return v.shape[transpose ? 1 : 0]; };
    const int64_t m = rows(a, options.transpose_a), k = rows(a, !options.transpose_a);
    const int64_t n = rows(b, !options.transpose_b), k_of_b = rows(b, options.transpose_b);
    require(k == k_of_b, op, "op(a) is [{}, {}] but op(b) is [{}, {}]", m, k, k_of_b, n);
    require_shape(op, "c", "m n", c, {m, n});
    Product p{.m = m,
              .n = n,
              .k = k,
              .a = matrix_of(a),
              .b = matrix_of(b),
              .c = c.data,
              .c_stride = c.stride,
              .alpha = options.alpha,
              .beta = options.beta};
    p.a.transpose = options.transpose_a;
    p.b.transpose = options.transpose_b;
    product(ex, p);
}

}  // namespace ssm
