#include "ssm/autograd/tape.h"

#include "ssm/core/parallel.h"
#include "ssm/ops/elementwise/elementwise.h"

namespace ssm {
namespace {

constexpr int64_t kCopiedRows = 64;  // a thread is not woken for less

}  // namespace

bool Var::has_grad() const {
    if (!node_) return false;
    return node_->parent ? static_cast<bool>(node_->parent->grad) : static_cast<bool>(node_->grad);
}

Var::Range Var::range() const {
    return {node_->begin, node_->begin + (value().rank() == 2 ? value().dim(1) : 1)};
}

Tensor Var::slice_of_grad() const {
    const Tensor& grad = root().grad;
    return node_->parent ? grad.columns(range().begin, range().end) : grad;
}

// Only matrices have slices: what is not one is unset as a whole.
void Var::zero_unset(Node& root, Range range) {
    std::vector<Range> left;
    for (const Range u : root.unset) {
        const Range both{std::max(u.begin, range.begin), std::min(u.end, range.end)};
        if (both.begin >= both.end) {
            left.push_back(u);
            continue;
        }
        (root.grad.rank() == 2 ? root.grad.columns(both.begin, both.end) : root.grad).fill_zero();
        if (u.begin < both.begin) left.push_back({u.begin, both.begin});
        if (both.end < u.end) left.push_back({both.end, u.end});
    }
    root.unset = std::move(left);
}

Tensor Var::grad(const Exec& ex) const {
    Node& r = root();
    if (!r.grad) {
        r.grad = Tensor::zeros(ex, r.value.shape(), r.grad_dtype);
    } else if (!r.unset.empty()) {
        zero_unset(r, range());
    }
    return slice_of_grad();
}

void Var::unset_grad(const Exec& ex) const {
    Node& r = root();
    if (!r.grad) r.grad = Tensor::empty(ex, r.value.shape(), r.grad_dtype);
    r.unset = {{0, r.value.rank() == 2 ? r.value.dim(1) : 1}};
}

Var::GradTarget Var::grad_target(const Exec& ex) const {
    Node& r = root();
    const Range own = range();
    if (!r.grad) unset_grad(ex);
    for (Range& u : r.unset) {
        if (own.begin < u.begin || u.end < own.end) continue;
        const Range after{own.end, u.end};
        u.end = own.begin;
        r.unset.push_back(after);
        std::erase_if(r.unset, [](const Range& e) { return e.begin >= e.end; });
        return {slice_of_grad(), true};
    }
    return {grad(ex), false};
}

void Var::add_grad(const Exec& ex, const Tensor& g) const {
    const auto matrix = [](const Tensor& t) { return t.rank() == 2 ? t : t.reshape({1, t.size()}); };
    const auto dispatch = [&](const Tensor& to, auto&& f) {
        dispatch_activation(g.dtype(), "add_grad", [&]<class X>() {
            dispatch_activation(to.dtype(), "add_grad", [&]<class Y>() {
                f(matrix(g).template view<const X, 2>(), matrix(to).template view<Y, 2>());
            });
        });
    };
    if (node_->parent || node_->grad) {
        const Tensor to = grad(ex);
        return dispatch(to, [&](auto from, auto into) { accumulate(ex, from, into); });
    }
    node_->grad = Tensor::empty(ex, value().shape(), node_->grad_dtype);
    const Tensor& copy = node_->grad;
    if (g.dtype() != copy.dtype()) return dispatch(copy, [&](auto from, auto into) { cast(ex, from, into); });
    if (ex.device != Device::cpu) return copy.copy_from(g);
    parallel_for(ex, g.rank() > 0 ? g.dim(0) : 0, kCopiedRows,
                 [&](int64_t begin, int64_t end) { copy.rows(begin, end).copy_from(g.rows(begin, end)); });
}

void Var::take_grad(const Exec& ex, const Tensor& g) const {
    if (node_->parent || node_->grad || g.dtype() != node_->grad_dtype) return add_grad(ex, g);
    set_grad(g);
}

Var Var::columns(int64_t begin, int64_t end) const {
    const std::shared_ptr<Node> root = node_->parent ? node_->parent : node_;
    const auto slice = std::make_shared<Node>(Node{value().columns(begin, end),
                                                   {},
                                                   node_->grad_dtype,
                                                   node_->requires_grad,
                                                   root,
                                                   node_->begin + begin,
                                                   {},
                                                   {},
                                                   {}});
    root->slices.push_back(slice);
    return Var(slice);
}

Var Var::with_value(Tensor value) const {
    return Var(std::make_shared<Node>(Node{std::move(value),
                                           {},
                                           node_->grad_dtype,
                                           node_->requires_grad,
                                           node_->parent ? node_->parent : node_,
                                           node_->begin,
                                           {},
                                           {},
                                           {}}));
}

void Var::set_value(Tensor value) const {
    node_->value = std::move(value);
    for (const std::weak_ptr<Node>& weak : node_->slices) {
        const std::shared_ptr<Node> slice = weak.lock();
        if (!slice) continue;
        slice->value = node_->value.columns(slice->begin, slice->begin + slice->value.dim(1));
    }
    const auto waiting = std::move(node_->waiting);
    node_->waiting.clear();
    for (const auto& f : waiting) f(node_->value);
}

void Var::when_there(std::function<void(const Tensor&)> f) const {
    if (value()) return f(value());
    node_->waiting.push_back(std::move(f));
}

void Var::forget_value() const {
    const auto forget = [](Node& n) {
        n.value = Tensor::wrap(nullptr, n.value.shape(), n.value.dtype(), {});
    };
    forget(*node_);
    for (const std::weak_ptr<Node>& weak : node_->slices) {
        if (const std::shared_ptr<Node> slice = weak.lock()) forget(*slice);
    }
}

void Tape::backward() {
    while (!closures_.empty()) {
        const std::function<void()> closure = std::move(closures_.back());
        closures_.pop_back();
        closure();
    }
}

namespace {

// For what runs now and again later.
Ctx without_tape(const Ctx& ctx) {
    Ctx plain = ctx;
    plain.tape = nullptr;
    plain.recomputed_later = true;
    return plain;
}

}  // namespace

void remade(Ctx& ctx, const Var& v, std::function<Var(Ctx&)> make) {
    if (ctx.recompute != Recompute::cheap || !ctx.recording({&v})) return;
    v.forget_value();
    std::vector<int64_t> cu(ctx.cu_seqlens.begin(), ctx.cu_seqlens.end());
    ctx.tape->record([ctx, cu = std::move(cu), v, make = std::move(make)] {
        Ctx again = without_tape(ctx);
        again.cu_seqlens = cu;
        v.set_value(make(again).value());
    });
}

std::vector<Var> recomputed(Ctx& ctx, const std::vector<Var>& inputs,
                            const std::function<std::vector<Var>(Ctx&, const std::vector<Var>&)>& f) {
    if (ctx.tape == nullptr || ctx.recompute != Recompute::layers) return f(ctx, inputs);
    Ctx plain = without_tape(ctx);
    std::vector<Var> results;
    for (const Var& r : f(plain, inputs)) results.emplace_back(r.value(), true, r.value().dtype());
    std::vector<int64_t> cu(ctx.cu_seqlens.begin(), ctx.cu_seqlens.end());
    ctx.tape->record([&ex = ctx.exec, ctx, cu = std::move(cu), inputs, results, f] {
        Tape tape;
        Ctx again = ctx;
        again.tape = &tape;
        again.cu_seqlens = cu;
        again.recompute = Recompute::none;
        std::vector<Var> leaves;
        for (const Var& v : inputs)
            leaves.push_back(v ? Var(v.value(), v.requires_grad(), v.grad_dtype()) : v);
        const std::vector<Var> inner = f(again, leaves);
        for (size_t i = 0; i < results.size(); ++i) {
            if (results[i].has_grad()) inner[i].take_grad(ex, results[i].grad(ex));
            results[i].clear_grad();
        }
        tape.backward();
        for (size_t i = 0; i < inputs.size(); ++i) {
            if (leaves[i].requires_grad() && leaves[i].has_grad())
                inputs[i].take_grad(ex, leaves[i].grad(ex));
        }
    });
    return results;
}

}  // namespace ssm
