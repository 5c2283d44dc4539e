#include "ssm/autograd/tape.h"

#include "ssm/ops/elementwise/elementwise.h"

namespace ssm {

bool Var::has_grad() const {
    if (!node_) return false;
    return node_->parent ? static_cast<bool>(node_->parent->grad) : static_cast<bool>(node_->grad);
}

Tensor Var::grad(const Exec& ex) const {
    if (node_->parent)
        return Var(node_->parent).grad(ex).columns(node_->begin, node_->begin + value().dim(1));
    if (!node_->grad) node_->grad = Tensor::zeros(ex, value().shape());
    return node_->grad;
}

void Var::add_grad(const Exec& ex, const Tensor& g) const {
    if (!node_->parent && !node_->grad) {
        node_->grad = Tensor::empty(ex, value().shape());
        node_->grad.copy_from(g);
        return;
    }
    accumulate(ex, g.view<const float, 2>(), grad(ex).view<float, 2>());
}

Var Var::columns(int64_t begin, int64_t end) const {
    const std::shared_ptr<Node> root = node_->parent ? node_->parent : node_;
    return Var(std::make_shared<Node>(
        Node{value().columns(begin, end), {}, node_->requires_grad, root, node_->begin + begin}));
}

void Tape::backward() {
    while (!closures_.empty()) {
        const std::function<void()> closure = std::move(closures_.back());
        closures_.pop_back();
        closure();
    }
}

}  // namespace ssm
