// Losses and what they send back: 16-bit operands are computed in float32, and a result is rounded once.
#include <ATen/core/Reduction.h>

#include "ops/operator.h"

namespace cann {
namespace {

std::optional<Tensor> given(const Tensor& weight) { return weight.defined() ? std::optional(up(weight)) : std::nullopt; }

// The gradient of each element's loss, from that of the reduced one.
Tensor of_elements(const Tensor& grad, const Tensor& elements, int64_t reduction) {
    return reduction == at::Reduction::Mean ? up(grad) / elements.numel() : up(grad);
}

Tensor l1_backward(const Tensor& grad, const Tensor& self, const Tensor& target, int64_t reduction) {
    const Tensor sign = at::sgn(up(self) - up(target));
    return of_elements(grad, sign, reduction) * sign;
}

Tensor bce_with_logits_backward(const Tensor& grad, const Tensor& self, const Tensor& target, const Tensor& weight,
                                const Tensor& pos_weight, int64_t reduction) {
    const Tensor right = up(target), positive = pos_weight.defined() ? up(pos_weight) * right : right;
    Tensor slope = (positive + 1 - right) * at::sigmoid(up(self)) - positive;
    if (weight.defined()) slope = slope * up(weight);
    return of_elements(grad, slope, reduction) * slope;
}

Tensor kl_div_backward(const Tensor& grad, const Tensor& target, int64_t reduction, bool log_target) {
    const Tensor right = up(target), share = log_target ? at::exp(right) : at::clamp_min(right, 0);
    return -share * of_elements(grad, right, reduction);
}

Tensor kl_div_target_backward(const Tensor& grad, const Tensor& self, const Tensor& target, int64_t reduction,
                              bool log_target) {
    const Tensor right = up(target), logarithm = log_target ? right : at::log(right);
    const Tensor slope = logarithm + 1 - up(self);
    const Tensor of_share = log_target ? at::exp(right) * slope : at::where(right > 0, slope, 0);
    return of_share * of_elements(grad, right, reduction);
}

Tensor classes(const Tensor& target) { return target.to(at::kLong); }

int64_t reduction_of(const std::string& name) {
    return name == "none" ? at::Reduction::None : name == "sum" ? at::Reduction::Sum : at::Reduction::Mean;
}

// From the logarithms of the shares, [samples, classes].
Tensor cross_entropy_backward(const Tensor& grad, const Tensor& log_shares, const Tensor& target, const Tensor& weight,
                              int64_t reduction, int64_t ignored, double smoothing) {
    const int64_t count = log_shares.size(1);
    const Tensor kept = at::ne(target, ignored), right = at::where(kept, classes(target), 0);
    const Tensor weights = weight.defined() ? up(weight) : at::ones({count});
    const Tensor of_right = weights.index_select(0, right) * kept;
    Tensor each = up(grad).expand_as(of_right) * kept;
    if (reduction == at::Reduction::Mean) each = each / of_right.sum();
    const Tensor smooth = (each * (-smoothing / count)).unsqueeze(1) * weights;
    const Tensor sharp = (each * (smoothing - 1) * of_right).unsqueeze(1);
    return at::_log_softmax_backward_data(smooth.scatter_add(1, right.unsqueeze(1), sharp), log_shares, 1, at::kFloat);
}

}  // namespace
}  // namespace cann

#define LOSS(NAME, F)                                                                                          \
    FUNCTION(NAME, (Tensor self, Tensor target, int64_t reduction), F(up(self), up(target), reduction))        \
    FUNCTION(NAME##Backward, (Tensor gradOutput, Tensor self, Tensor target, int64_t reduction),               \
             F##_backward(up(gradOutput), up(self), up(target), reduction))
LOSS(MseLoss, at::mse_loss)
LOSS(SoftMarginLoss, at::soft_margin_loss)
FUNCTION(L1Loss, (Tensor self, Tensor target, int64_t reduction), at::l1_loss(up(self), up(target), reduction))
FUNCTION(L1LossBackward, (Tensor gradOutput, Tensor self, Tensor target, int64_t reduction),
         l1_backward(gradOutput, self, target, reduction))
FUNCTION(SmoothL1Loss, (Tensor self, Tensor target, int64_t reduction, float beta),
         at::smooth_l1_loss(up(self), up(target), reduction, beta))
FUNCTION(SmoothL1LossBackward, (Tensor gradOut, Tensor self, Tensor target, int64_t reduction, float beta),
         at::smooth_l1_loss_backward(up(gradOut), up(self), up(target), reduction, beta))
FUNCTION(BinaryCrossEntropy, (Tensor self, Tensor target, Tensor weight, int64_t reduction),
         at::binary_cross_entropy(up(self), up(target), given(weight), reduction))
FUNCTION(BinaryCrossEntropyBackward,
         (Tensor gradOutput, Tensor self, Tensor target, Tensor weightOptional, int64_t reduction),
         at::binary_cross_entropy_backward(up(gradOutput), up(self), up(target), given(weightOptional), reduction))
FUNCTION(BinaryCrossEntropyWithLogits,
         (Tensor self, Tensor target, Tensor weightOptional, Tensor posWeightOptional, int64_t reduction),
         at::binary_cross_entropy_with_logits(up(self), up(target), given(weightOptional), given(posWeightOptional), reduction))
FUNCTION(BinaryCrossEntropyWithLogitsBackward,
         (Tensor gradOutput, Tensor self, Tensor target, Tensor weightOptional, Tensor posWeightOptional, int64_t reduction),
         bce_with_logits_backward(gradOutput, self, target, weightOptional, posWeightOptional, reduction))
FUNCTION(KlDiv, (Tensor self, Tensor target, int64_t reduction, bool logTarget),
         at::kl_div(up(self), up(target), reduction, logTarget))
FUNCTION(KlDivBackward, (Tensor gradOutput, Tensor self, Tensor target, int64_t reduction, bool logTarget),
         kl_div_backward(gradOutput, target, reduction, logTarget))
FUNCTION(KlDivTargetBackward, (Tensor gradOutput, Tensor self, Tensor target, int64_t reduction, bool logTarget),
         kl_div_target_backward(gradOutput, self, target, reduction, logTarget))

#define NLL_LOSS(NAME, F)                                                                                           \
    ACLNN(NAME, (Tensor self, Tensor target, Tensor weight, int64_t reduction, int64_t ignoreIndex, OutTensor out,  \
                 OutTensor totalWeightOut) {                                                                        \
        const auto [loss, total] = F##_forward(up(self), classes(target), given(weight), reduction, ignoreIndex);   \
        put(out, loss);                                                                                             \
        put(totalWeightOut, total);                                                                                 \
    })                                                                                                              \
    FUNCTION(NAME##Backward,                                                                                        \
             (Tensor gradOutput, Tensor self, Tensor target, Tensor weight, int64_t reduction, int64_t ignoreIndex, \
              Tensor totalWeight),                                                                                  \
             F##_backward(up(gradOutput), up(self), classes(target), given(weight), reduction, ignoreIndex, up(totalWeight)))
NLL_LOSS(NLLLoss, at::nll_loss)
NLL_LOSS(NLLLoss2d, at::nll_loss2d)

// What the operators take of the z-loss has no effect, as their pages say.
ACLNN(CrossEntropyLoss, (Tensor input, Tensor target, Tensor weightOptional, std::string reduction, int64_t ignoreIndex,
                         double labelSmoothing, double lseSquareScaleForZloss, bool returnZloss, OutTensor lossOut,
                         OutTensor logProbOut, OutTensor zlossOut, OutTensor lseForZlossOut) {
    put(lossOut, at::cross_entropy_loss(up(input), classes(target), given(weightOptional), reduction_of(reduction), ignoreIndex,
                                        labelSmoothing));
    put(logProbOut, at::log_softmax(up(input), 1));
})
FUNCTION(CrossEntropyLossGrad,
         (Tensor gradLoss, Tensor logProb, Tensor target, Tensor weightOptional, Tensor gradZlossOptional,
          Tensor lseForZlossOptional, std::string reduction, int64_t ignoreIndex, double labelSmoothing,
          double lseSquareScaleForZloss),
         cross_entropy_backward(gradLoss, up(logProb), target, weightOptional, reduction_of(reduction), ignoreIndex,
                                labelSmoothing))
