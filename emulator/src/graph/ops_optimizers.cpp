// Optimisers that torch_npu calls through aclop. They write what they read: var, m and v are inputs and outputs.
#include "graph/operation.h"

namespace cann::graph {
namespace {

Results updated(const Operands& x, const Tensor& var, const Tensor& m, const Tensor& v) {
    return {as(x[0].scalar_type(), var), as(x[1].scalar_type(), m), as(x[2].scalar_type(), v)};
}

void refuse_in_graphs(const Operands& x) {
    TORCH_CHECK(!x.compiling(), "optimisers in compiled graphs are not emulated: call them outside");
}

struct Moments {
    Tensor m, v;
};

Moments moments(const Operands& x, const Tensor& grad, const Tensor& beta1, const Tensor& beta2) {
    return {x.up(1) * beta1 + grad * (1 - beta1), x.up(2) * beta2 + grad * grad * (1 - beta2)};
}

// Inputs: var, m, v, beta1^(t-1), beta2^(t-1), lr, beta1, beta2, epsilon, grad (ops-nn optim/apply_adam_d).
Results adam(const Operands& x) {
    refuse_in_graphs(x);
    x.flag("use_locking");
    const Tensor grad = x.up(9), beta1 = x.up(6);
    const auto [m, v] = moments(x, grad, beta1, x.up(7));
    const Tensor direction = x.flag("use_nesterov") ? m * beta1 + grad * (1 - beta1) : m;
    const Tensor rate = x.up(5) * at::sqrt(1 - x.up(4)) / (1 - x.up(3));
    return updated(x, x.up(0) - rate * direction / (x.up(8) + v.sqrt()), m, v);
}

// Inputs: var, m, v, beta1^(t-1), beta2^(t-1), lr, weight_decay, beta1, beta2, epsilon, grad (ops-nn optim/apply_adam_w).
Results adam_w(const Operands& x) {
    refuse_in_graphs(x);
    TORCH_CHECK(!x.flag("amsgrad"), "amsgrad must be false");  // op-plugin, ApplyAdamWKernelNpu.cpp
    const Tensor grad = x.flag("maximize") ? -x.up(10) : x.up(10), lr = x.up(5), beta1 = x.up(7), beta2 = x.up(8);
    const auto [m, v] = moments(x, grad, beta1, beta2);
    const Tensor deviation = at::sqrt(v / (1 - x.up(4) * beta2)) + x.up(9);
    return updated(x, x.up(0) * (1 - lr * x.up(6)) - lr * m / (1 - x.up(3) * beta1) / deviation, m, v);
}

// Inputs: var, m, v, lr, beta1, beta2, epsilon, grad, max_grad_norm, global_grad_norm, weight_decay, and of mBART the
// size of a step (ops-nn optim/apply_adam_v2).
Results bert_adam(const Operands& x) {
    refuse_in_graphs(x);
    const bool mbart = x.text("adam_mode", "adam") == "mbart_adam";
    TORCH_CHECK(mbart || x.up(8).item<double>() <= 0, "a max_grad_norm above 0 is not emulated: by the operator's page it ",
                "clips to that, by its kernel to 1. Clip before the call, and pass -1");
    const auto [m, v] = moments(x, x.up(7), x.up(4), x.up(5));
    const Tensor lr = x.up(3), step = mbart && x[11].defined() ? x.up(11) : lr;
    return updated(x, x.up(0) - step * m / (v.sqrt() + x.up(6)) - lr * x.up(10) * x.up(0), m, v);
}

}  // namespace
}  // namespace cann::graph

GE(ApplyAdamD, adam(x))
GE(ApplyAdamW, adam_w(x))
GE(ApplyAdamV2, bert_adam(x))
