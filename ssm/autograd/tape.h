// Reverse-mode differentiation: a Var is a tensor that may want a gradient; a Tape is the list of closures
// that carry gradients back, run in reverse. Operators compute (ssm/ops); here only allocation and
// remembering happen.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "ssm/core/exec.h"
#include "ssm/core/tensor.h"
#include "ssm/ops/sequences.h"

namespace ssm {

// A value and, where wanted, its gradient, of the same shape. Copies share both. A parameter's gradient is
// f32 whatever the value's type; that of an operator's result has the result's type.
class Var {
public:
    Var() = default;  // absent optional argument: `if (!var)`
    explicit Var(Tensor value, bool requires_grad = false, DType grad = DType::f32)
        : node_(std::make_shared<Node>(
              Node{std::move(value), {}, grad, requires_grad, nullptr, 0, {}, {}, {}})) {}

    explicit operator bool() const { return node_ != nullptr; }
    const Tensor& value() const { return node_->value; }
    // Another value of the same shape and type; slices become windows on it. Not of a slice.
    void set_value(Tensor value) const;
    // Lets the memory of the value, and of its slices, go: shape and type remain. For what nothing reads any
    // more but its gradient.
    void forget_value() const;
    DType grad_dtype() const { return node_->grad_dtype; }
    bool requires_grad() const { return node_ != nullptr && node_->requires_grad; }
    bool has_grad() const;

    // The gradient's buffer, made and zeroed at the first call. Of a slice: the slice of its parent's.
    Tensor grad(const Exec& ex) const;
    // The same for an operator that adds to the buffer or, where it is `fresh` (made now and not zeroed),
    // must set all of it: large gradients are then written once instead of zeroed, read and written.
    struct GradTarget {
        Tensor tensor;
        bool fresh;
    };
    GradTarget grad_target(const Exec& ex) const;
    // Calls `f` with the value now or, where it is forgotten, when there is one again: a function whose
    // backward pass gives its result once more runs behind those that read it.
    void when_there(std::function<void(const Tensor&)> f) const;

    // The buffer, made or not, holds nothing: the first that adds to it sets it. What stays where it is, a
    // parameter's gradient, need not be zeroed before a step.
    void unset_grad(const Exec& ex) const;
    // Another value, of the same shape and perhaps rounded, with this one's gradient. Not kept in step with
    // set_value and forget_value.
    Var with_value(Tensor value) const;

    // Drops the buffer (Tape::backward does so for what it has used up) or puts another in its place.
    void clear_grad() const { set_grad({}); }
    void set_grad(Tensor grad) const {
        node_->grad = std::move(grad);
        node_->unset.clear();
    }
    // grad += g, in the gradient's type; the first time a copy.
    void add_grad(const Exec& ex, const Tensor& g) const;
    // The same with g given away: where there is no gradient yet, g becomes it without a copy.
    void take_grad(const Exec& ex, const Tensor& g) const;

    // Columns begin:end of a matrix [t d]: a window on the value and on the gradient, no computation.
    Var columns(int64_t begin, int64_t end) const;

private:
    struct Range {
        int64_t begin, end;
    };
    struct Node {
        Tensor value, grad;
        DType grad_dtype;
        bool requires_grad;
        std::shared_ptr<Node> parent;  // of a slice
        int64_t begin;
        std::vector<Range> unset;  // columns of grad that hold no gradient yet
        std::vector<std::weak_ptr<Node>> slices;
        std::vector<std::function<void(const Tensor&)>> waiting;  // for the value
    };
    Node& root() const { return node_->parent ? *node_->parent : *node_; }
    Range range() const;  // this slice's columns of the root
    Tensor slice_of_grad() const;
    static void zero_unset(Node& root, Range range);
    explicit Var(std::shared_ptr<Node> node) : node_(std::move(node)) {}
    std::shared_ptr<Node> node_;
};

class Tape {
public:
    void record(std::function<void()> backward) { closures_.push_back(std::move(backward)); }
    // Runs the closures last to first, each released after it ran: a training step's memory shrinks as it
    // goes.
    void backward();
    size_t size() const { return closures_.size(); }

private:
    std::vector<std::function<void()>> closures_;
};

// What a training step computes again in its backward pass instead of keeping it.
//   none    nothing
//   cheap   what an operator that is bound by memory, or a small product, makes of what is kept: `remade`
//   layers  all inner results of a layer: `recomputed`
enum class Recompute { none, cheap, layers };

// What a forward pass needs beside its arguments. Without a tape it is inference.
struct Ctx {
    const Exec& exec;
    Tape* tape = nullptr;
    CuSeqlens cu_seqlens = {};      // how rows [t d] split into sequences; empty: one token each (a step)
    DType activation = DType::f32;  // of what flows inside the layers
    Recompute recompute = Recompute::none;
    bool recomputed_later = false;  // no tape now, but the same again with one: inputs must stay as they are
    Slots slots = {};               // of a step: rows of the state; absent: row s for sequence s

    // Weights do not change: what is made of them may be kept; and residuals may be added in place.
    bool inference() const { return tape == nullptr && !recomputed_later; }
    // Of what a layer gives to the residual: f32 in inference; in training, where it is kept, the
    // activation's.
    DType branch() const { return inference() ? DType::f32 : activation; }
    bool recording(std::initializer_list<const Var*> inputs) const {
        if (tape == nullptr) return false;
        for (const Var* v : inputs) {
            if (v->requires_grad()) return true;
        }
        return false;
    }
};

// To be called behind the last function that reads `v`. With a tape and Recompute::cheap the value of `v` is
// let go; the backward pass makes it again by `make`, with a context that has no tape, before the first
// function that reads it, and lets it go behind the one that made it. What `make` reads must be kept, or
// remade by a later call: the last that is recorded comes first. Else nothing happens.
void remade(Ctx& ctx, const Var& v, std::function<Var(Ctx&)> make);

// The results of f(ctx, inputs). With a tape and Recompute::layers only the inputs are kept: f runs once
// without a tape now, and once more with one of its own when the gradients of the results are there.
std::vector<Var> recomputed(Ctx& ctx, const std::vector<Var>& inputs,
                            const std::function<std::vector<Var>(Ctx&, const std::vector<Var>&)>& f);

}  // namespace ssm
