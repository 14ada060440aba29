// What follows a backward pass: gradient scaling and optimisers. All of it is computed in float32 and rounded once.
#include "ops/operator.h"

namespace cann {
namespace {

struct Adam {
    double lr, beta1, beta2, weight_decay, eps;
    bool amsgrad, maximize;
};

// AdamW with decoupled decay. `steps` are those before this one (ops-nn optim/apply_adam_w_v2/op_kernel).
void adam_w(const Tensor& var, const Tensor& m, const Tensor& v, const Tensor& largest, const Tensor& grad, double steps,
            const Adam& call) {
    const Tensor gradient = call.maximize ? -up(grad) : up(grad);
    const Tensor mean = up(m) + (gradient - up(m)) * (1 - call.beta1);
    const Tensor square = up(v) * call.beta2 + gradient * gradient * (1 - call.beta2);
    const Tensor variance = call.amsgrad ? at::maximum(up(largest), square) : square;
    const double correction1 = 1 - std::pow(call.beta1, steps + 1), correction2 = 1 - std::pow(call.beta2, steps + 1);
    const Tensor deviation = variance.sqrt() / std::sqrt(correction2) + call.eps;
    put(var, up(var) * (1 - call.lr * call.weight_decay) - mean / deviation * (call.lr / correction1));
    put(m, mean);
    put(v, square);
    if (call.amsgrad) put(largest, variance);
}

struct Sgd {
    double weight_decay, momentum, lr, dampening;
    bool nesterov, maximize, first;
};

// `buffer` is undefined where nobody keeps it. A scaled gradient is written back (aclnnFusedSgd.md).
void sgd(const Tensor& param, const Tensor& grad, const Tensor& buffer, const Tensor& scale, const Sgd& call) {
    const Tensor unscaled = scale.defined() ? up(grad) / up(scale) : up(grad);
    const Tensor decayed = (call.maximize ? -unscaled : unscaled) + up(param) * call.weight_decay;
    Tensor change = decayed;
    if (buffer.defined()) {
        const Tensor velocity = call.first ? decayed : up(buffer) * call.momentum + decayed * (1 - call.dampening);
        change = call.nesterov ? decayed + velocity * call.momentum : velocity;
        put(buffer, velocity);
    }
    put(param, up(param) - change * call.lr);
    if (scale.defined()) put(grad, unscaled);
}

}  // namespace
}  // namespace cann

ACLNN(ApplyAdamWV2, (OutTensor var, OutTensor m, OutTensor v, OutTensor maxGradNorm, Tensor grad, Tensor step, float lr,
                     float beta1, float beta2, float weightDecay, float eps, bool amsgrad, bool maximize) {
    adam_w(var, m, v, maxGradNorm, grad, step.item<double>(), {lr, beta1, beta2, weightDecay, eps, amsgrad, maximize});
})
ACLNN(FusedSgd, (OutTensors params, OutTensors grads, OutTensors momentumBufferList, Tensor gradScale, float weightDecay,
                 float momentum, float lr, float dampening, bool nesterov, bool maximize, bool isFirstStep) {
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor buffer = momentumBufferList.empty() ? Tensor() : momentumBufferList[i];
        sgd(params[i], grads[i], buffer, gradScale, {weightDecay, momentum, lr, dampening, nesterov, maximize, isFirstStep});
    }
})

ACLNN(ForeachNonFiniteCheckAndUnscale, (OutTensors scaledGrads, OutTensor foundInf, Tensor invScale) {
    for (const Tensor& grad : scaledGrads) {
        if (!at::isfinite(grad).all().item<bool>()) foundInf.fill_(1);
        put(grad, up(grad) * invScale.reshape({}));
    }
})
ACLNN(AmpUpdateScale, (Tensor currentScale, Tensor growthTracker, Tensor foundInf, double growthFactor,
                       double backoffFactor, int64_t growthInterval, OutTensor updatedScale, OutTensor updatedGrowthTracker) {
    const Tensor scale = up(currentScale);
    const bool found = foundInf.item<double>() != 0;
    const int64_t tracked = found ? 0 : growthTracker.item<int64_t>() + 1;
    const bool grows = !found && tracked == growthInterval;
    const Tensor changed = scale * (found ? backoffFactor : grows ? growthFactor : 1);
    const bool fits = at::isfinite(changed.to(updatedScale.scalar_type())).item<bool>();
    put(updatedScale, fits ? changed : scale);
    updatedGrowthTracker.fill_(grows ? 0 : tracked);
})
