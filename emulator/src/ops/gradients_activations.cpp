// What activations and the softmax send back: 16-bit operands are computed in float32, and a result is rounded once.
#include "ops/operator.h"
#include "ops/shared.h"

namespace cann {
namespace {

// The gradient of a gated unit, activation(one half) * other half, from the gradients of its halves.
Tensor join(bool activates_first, const Tensor& of_activated, const Tensor& of_other, int64_t dim) {
    return activates_first ? at::cat({of_activated, of_other}, dim) : at::cat({of_other, of_activated}, dim);
}

Tensor geglu_backward(const Tensor& grad, const Tensor& x, const Tensor& gelu, int64_t dim, int64_t approximate,
                      bool activates_first) {
    const auto [first, second] = halves(x, dim);
    const Tensor activated = activates_first ? first : second, other = activates_first ? second : first;
    const Tensor of_activated = at::gelu_backward(up(grad) * other, activated, approximate == 1 ? "tanh" : "none");
    return join(activates_first, of_activated, up(grad) * up(gelu), dim);
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x, int64_t dim) {
    const auto [gate, value] = halves(x, dim);
    return join(true, at::silu_backward(up(grad) * value, gate), up(grad) * at::silu(gate), dim);
}

// The weight as it spreads over the channels of x, the second dimension.
Tensor spread_over_channels(const Tensor& weight, const Tensor& x) {
    if (weight.numel() == 1 || x.dim() < 2) return up(weight).flatten();
    Ints shape(x.dim(), 1);
    shape[1] = weight.numel();
    return up(weight).view(shape);
}

}  // namespace

Tensor fast_gelu_backward(const Tensor& grad, const Tensor& x) {
    const Tensor gate = at::sigmoid(x * 1.702);
    return grad * gate * (1 + 1.702 * x * (1 - gate));
}

RotaryGradients rotary_backward(const Tensor& grad, const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode) {
    const Tensor wide = up(grad), of_x = wide * up(cos) - rotate(wide * up(sin), mode);
    if (!x.defined()) return {of_x, {}, {}};
    return {of_x, (wide * up(x)).sum_to_size(cos.sizes()), (wide * rotate(up(x), mode)).sum_to_size(sin.sizes())};
}

}  // namespace cann

// `kept` is what the forward pass keeps: its input, or its result.
#define BACKWARD(NAME, F) FUNCTION(NAME, (Tensor gradOutput, Tensor kept), F(up(gradOutput), up(kept)))
BACKWARD(SiluBackward, at::silu_backward)
BACKWARD(SigmoidBackward, at::sigmoid_backward)
BACKWARD(TanhBackward, at::tanh_backward)
BACKWARD(HardswishBackward, at::hardswish_backward)
BACKWARD(HardswishBackwardV2, at::hardswish_backward)
BACKWARD(HardsigmoidBackward, at::hardsigmoid_backward)
BACKWARD(MishBackward, at::mish_backward)
BACKWARD(FastGeluBackward, fast_gelu_backward)
// The tanh form whatever torch was asked for, as aclnnGelu.
FUNCTION(GeluBackward, (Tensor gradOutput, Tensor self), at::gelu_backward(up(gradOutput), up(self), "tanh"))
FUNCTION(GeluBackwardV2, (Tensor gradOutput, Tensor self, std::string approximate),
         at::gelu_backward(up(gradOutput), up(self), approximate))
FUNCTION(GeGluV3Backward,
         (Tensor gradOutput, Tensor self, Tensor gelu, int64_t dim, int64_t approximate, bool activateLeft),
         geglu_backward(gradOutput, self, gelu, dim, approximate, activateLeft))
FUNCTION(SwiGluGrad, (Tensor yGrad, Tensor x, int64_t dim), swiglu_backward(yGrad, x, dim))
FUNCTION(GluBackward, (Tensor gradOut, Tensor self, int64_t dim), at::glu_backward(up(gradOut), up(self), dim))
FUNCTION(ThresholdBackward, (Tensor gradOutput, Tensor self, Scalar threshold),
         at::threshold_backward(up(gradOutput), up(self), threshold))
FUNCTION(SoftplusBackward, (Tensor gradOutput, Tensor self, Scalar beta, Scalar threshold),
         at::softplus_backward(up(gradOutput), up(self), beta, threshold))
FUNCTION(HardtanhBackward, (Tensor gradOutput, Tensor self, Scalar min, Scalar max),
         at::hardtanh_backward(up(gradOutput), up(self), min, max))
FUNCTION(LeakyReluBackward, (Tensor gradOutput, Tensor self, Scalar negativeSlope, bool selfIsResult),
         at::leaky_relu_backward(up(gradOutput), up(self), negativeSlope, selfIsResult))
FUNCTION(EluBackward,
         (Tensor gradOutput, Scalar alpha, Scalar scale, Scalar inputScale, bool isResult, Tensor selfOrResult),
         at::elu_backward(up(gradOutput), alpha, scale, inputScale, isResult, up(selfOrResult)))
FUNCTION(LogSigmoidBackward, (Tensor gradOutput, Tensor self, Tensor buffer), up(gradOutput) * at::sigmoid(-up(self)))
FUNCTION(SoftshrinkBackward, (Tensor gradOutput, Tensor self, Scalar lambda),
         at::softshrink_backward(up(gradOutput), up(self), lambda))
FUNCTION(HardshrinkBackward, (Tensor gradOutput, Tensor self, Scalar lambda),
         at::hardshrink_backward(up(gradOutput), up(self), lambda))
FUNCTION(LogitGrad, (Tensor x, Tensor dy, double eps),
         at::logit_backward(up(dy), up(x), eps < 0 ? std::nullopt : std::optional(eps)))
ACLNN(PreluBackward, (Tensor gradOutput, Tensor self, Tensor weight, OutTensor gradInput, OutTensor gradWeight) {
    const Tensor grad = up(gradOutput), x = up(self), slope = spread_over_channels(weight, x);
    put(gradInput, at::where(x > 0, grad, grad * slope));
    put(gradWeight, at::where(x > 0, 0, grad * x).sum_to_size(slope.sizes()));
})

FUNCTION(SoftmaxBackward, (Tensor gradOutput, Tensor output, int64_t dim),
         at::_softmax_backward_data(up(gradOutput), up(output), dim, up(output).scalar_type()))
FUNCTION(LogSoftmaxBackward, (Tensor gradOutput, Tensor output, int64_t dim),
         at::_log_softmax_backward_data(up(gradOutput), up(output), dim, up(output).scalar_type()))

ACLNN(RotaryPositionEmbeddingGrad, (Tensor dy, Tensor cos, Tensor sin, Tensor xOptional, int64_t mode, OutTensor dxOut,
                                    OutTensor dcosOut, OutTensor dsinOut) {
    const RotaryGradients gradients = rotary_backward(dy, xOptional, cos, sin, mode);
    put(dxOut, gradients.x);
    if (!xOptional.defined()) return;
    put(dcosOut, gradients.cos);
    put(dsinOut, gradients.sin);
})
