// What normalisations send back, from the statistics that the forward pass kept. Sums are float32.
#include "ops/gradients.h"

namespace cann {
namespace {

Gradients group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& gamma, int64_t groups, const Asked& mask) {
    const int64_t batch = x.size(0), channels = x.size(1);
    const int64_t pixels = x.numel() / std::max<int64_t>(batch * channels, 1);
    return at::native_group_norm_backward(up(grad).contiguous(), up(x).contiguous(), up(mean).contiguous(),
                                          up(rstd).contiguous(), up(gamma), batch, channels, pixels, groups, mask);
}

Gradients layer_norm_backward(const Tensor& grad, const Tensor& x, const Ints& shape, const Tensor& mean,
                              const Tensor& rstd, const Tensor& weight, const Asked& mask) {
    return at::native_layer_norm_backward(up(grad), up(x), shape, up(mean).contiguous(), up(rstd).contiguous(),
                                          up(weight), up(weight), mask);
}

// gamma along the dimension of the channels, the second one.
Tensor over_channels(const Tensor& gamma, const Tensor& x) {
    Ints shape(x.dim(), 1);
    shape[1] = -1;
    return up(gamma).view(shape);
}

// Of swish(group_norm(x)), where swish is y * sigmoid(scale * y).
Gradients group_norm_swish_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                    const Tensor& gamma, const Tensor& beta, int64_t groups, double scale,
                                    const Asked& mask) {
    const Tensor grouped = up(x).reshape({x.size(0), groups, -1});
    const Tensor normed = ((grouped - up(mean).unsqueeze(-1)) * up(rstd).unsqueeze(-1)).view(x.sizes());
    const Tensor y = normed * over_channels(gamma, x) + over_channels(beta, x);
    const Tensor gate = at::sigmoid(y * scale);
    return group_norm_backward(up(grad) * gate * (1 + scale * y * (1 - gate)), x, mean, rstd, gamma, groups, mask);
}

}  // namespace
}  // namespace cann

ACLNN(GroupNormBackward, (Tensor gradOut, Tensor input, Tensor mean, Tensor rstd, Tensor gamma, int64_t N, int64_t C,
                          int64_t HxW, int64_t group, Bools outputMask, OutTensor gradInput, OutTensor gradGammaOut,
                          OutTensor gradBetaOut) {
    put_gradients(group_norm_backward(gradOut, input, mean, rstd, gamma, group, asked(outputMask)), gradInput,
                  gradGammaOut, gradBetaOut);
})
ACLNN(GroupNormSwishGrad, (Tensor dy, Tensor mean, Tensor rstd, Tensor x, Tensor gamma, Tensor beta, int64_t numGroups,
                           std::string dataFormat, double swishScale, bool dgammaIsRequire, bool dbetaIsRequire,
                           OutTensor dxOut, OutTensor dgammaOut, OutTensor dbetaOut) {
    put_gradients(group_norm_swish_backward(dy, x, mean, rstd, gamma, beta, numGroups, swishScale,
                                            {true, dgammaIsRequire, dbetaIsRequire}),
                  dxOut, dgammaOut, dbetaOut);
})
ACLNN(LayerNormBackward, (Tensor gradOut, Tensor input, Ints normalizedShape, Tensor mean, Tensor rstd,
                          Tensor weightOptional, Tensor biasOptional, Bools outputMask, OutTensor gradInputOut,
                          OutTensor gradWeightOut, OutTensor gradBiasOut) {
    put_gradients(layer_norm_backward(gradOut, input, normalizedShape, mean, rstd, weightOptional, asked(outputMask)),
                  gradInputOut, gradWeightOut, gradBiasOut);
})
// Of layer_norm(x1 + x2) and of the sum itself, whose gradient is dsum.
ACLNN(AddLayerNormGrad, (Tensor dy, Tensor x1, Tensor x2, Tensor rstd, Tensor mean, Tensor gamma, Tensor dsumOptional,
                         OutTensor dxOut, OutTensor dgammaOut, OutTensor dbetaOut) {
    auto [x, weight, bias] = layer_norm_backward(dy, up(x1) + up(x2), gamma.sizes().vec(), mean, rstd, gamma,
                                                 {true, true, true});
    if (dsumOptional.defined()) x = x + up(dsumOptional);
    put_gradients({x, weight, bias}, dxOut, dgammaOut, dbetaOut);
})
ACLNN(RmsNormGrad, (Tensor dy, Tensor x, Tensor rstd, Tensor gamma, OutTensor dxOut, OutTensor dgammaOut) {
    Ints normed_dims(gamma.dim());
    for (int64_t i = 0; i < gamma.dim(); ++i) normed_dims[i] = -1 - i;
    const Tensor scale = up(rstd), normed = up(x) * scale, grad = up(dy) * up(gamma);
    put(dxOut, (grad - normed * (grad * normed).mean(normed_dims, true)) * scale);
    put(dgammaOut, (up(dy) * normed).sum_to_size(gamma.sizes()));
})
ACLNN(BatchNormBackward, (Tensor gradOut, Tensor input, Tensor weight, Tensor runningMean, Tensor runningVar,
                          Tensor saveMean, Tensor saveInvstd, bool training, double eps, Bools outputMask,
                          OutTensor gradInput, OutTensor gradWeight, OutTensor gradBias) {
    put_gradients(at::native_batch_norm_backward(up(gradOut), up(input), up(weight), up(runningMean), up(runningVar),
                                                 up(saveMean), up(saveInvstd), training, eps, asked(outputMask)),
                  gradInput, gradWeight, gradBias);
})
