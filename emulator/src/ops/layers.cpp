// Activations and normalisations. Statistics are float32.
#include "ops/operator.h"
#include "ops/shared.h"

namespace cann {
namespace {

const char* gelu_form(int64_t approximate) { return approximate == 1 ? "tanh" : "none"; }

void layer_norm(const Tensor& input, const Ints& shape, const Tensor& weight, const Tensor& bias, double eps, const Tensor& out,
                const Tensor& mean, const Tensor& rstd) {
    const auto [y, m, r] = at::native_layer_norm(up(input), shape, up(weight), up(bias), eps);
    put(out, y);
    put_if_given(mean, m);
    put_if_given(rstd, r);
}

}  // namespace

std::pair<Tensor, Tensor> halves(const Tensor& x, int64_t dim) {
    const auto parts = up(x).chunk(2, dim);
    return {parts[0], parts[1]};
}

GroupNormResult group_norm(const Tensor& self, const Tensor& gamma, const Tensor& beta, int64_t groups, double eps) {
    const Tensor x = up(self).contiguous();
    const int64_t batch = x.size(0), channels = x.size(1);
    const int64_t pixels = x.numel() / std::max<int64_t>(batch * channels, 1);
    auto [y, mean, rstd] = at::native_group_norm(x, up(gamma), up(beta), batch, channels, pixels, groups, eps);
    return {y, mean, rstd};
}

std::pair<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& gamma, double epsilon) {
    Ints dims(gamma.dim());
    for (int64_t i = 0; i < gamma.dim(); ++i) dims[i] = -1 - i;
    const Tensor wide = up(x);
    const Tensor rstd = at::rsqrt(wide.square().mean(dims, true) + epsilon);
    return {wide * rstd * up(gamma), rstd};
}

Tensor rotate(const Tensor& x, int64_t mode) {
    if (mode == kHalf) {
        const auto parts = x.chunk(2, -1);
        return at::cat({-parts[1], parts[0]}, -1);
    }
    TORCH_CHECK(mode == kInterleave, "rotary mode ", mode, " is not emulated");
    const Tensor pairs = x.unflatten(-1, {-1, 2});
    return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode) {
    const Tensor wide = up(x);
    return wide * up(cos) + rotate(wide, mode) * up(sin);
}

}  // namespace cann

// The chip's Gelu is the tanh form whatever torch was asked for.
FUNCTION(Gelu, (Tensor self), at::gelu(self, "tanh"))
FUNCTION(GeluV2, (Tensor x, int64_t approximate), at::gelu(x, gelu_form(approximate)))
FUNCTION(FastGelu, (Tensor self), up(self) * at::sigmoid(up(self) * 1.702))
ACLNN(GeluMul, (Tensor input, std::string approximate, OutTensor out) {
    const auto [gate, value] = halves(input, -1);
    put(out, at::gelu(gate, approximate == "tanh" ? "tanh" : "none") * value);
})
ACLNN(GeGluV3, (Tensor self, int64_t dim, int64_t approximate, bool activateLeft, OutTensor out, OutTensor out_gelu) {
    const auto [left, right] = halves(self, dim);
    const Tensor activated = at::gelu(activateLeft ? left : right, gelu_form(approximate));
    put(out, activated * (activateLeft ? right : left));
    put(out_gelu, activated);
})
ACLNN(SwiGlu, (Tensor x, int64_t dim, OutTensor out) {
    const auto [gate, value] = halves(x, dim);
    put(out, at::silu(gate) * value);
})
FUNCTION(Glu, (Tensor self, int64_t dim), at::glu(up(self), dim))
FUNCTION(LeakyRelu, (Tensor self, Scalar slope), at::leaky_relu(self, slope))
FUNCTION(Logit, (Tensor self, double eps), at::logit(up(self), eps < 0 ? std::nullopt : std::optional(eps)))
// Integers are computed as float32, and cut.
ACLNN(Hardsigmoid, (Tensor self, OutTensor out) { put(out, at::hardsigmoid(self.is_floating_point() ? self : self.to(at::kFloat))); })
ACLNN(InplaceHardsigmoid, (OutTensor self) { put(self, at::hardsigmoid(self)); })
BOTH(Hardswish, (Tensor self), at::hardswish(self))
BOTH(Hardtanh, (Tensor self, Scalar min, Scalar max), at::hardtanh(self, min, max))
BOTH(Elu, (Tensor self, Scalar alpha, Scalar scale, Scalar inputScale), at::elu(self, alpha, scale, inputScale))
BOTH(Mish, (Tensor self), at::mish(self))
BOTH(Threshold, (Tensor self, Scalar threshold, Scalar value), at::threshold(self, threshold, value))
FUNCTION(Softplus, (Tensor self, Scalar beta, Scalar threshold), at::softplus(self, beta, threshold))
FUNCTION(Softshrink, (Tensor self, Scalar lambda), at::softshrink(self, lambda))
FUNCTION(Hardshrink, (Tensor self, Scalar lambda), at::hardshrink(self, lambda))
FUNCTION(Prelu, (Tensor self, Tensor weight), at::prelu(up(self), up(weight).flatten()))
ACLNN(LogSigmoidForward, (Tensor self, OutTensor out, OutTensor buffer) { put(out, at::log_sigmoid(up(self))); })
FUNCTION(LogSigmoid, (Tensor self), at::log_sigmoid(up(self)))
FUNCTION(Softmax, (Tensor self, int64_t dim), at::softmax(up(self), dim))
FUNCTION(LogSoftmax, (Tensor self, int64_t dim), at::log_softmax(up(self), dim))
ACLNN(ScaledMaskedSoftmax, (Tensor x, Tensor mask, double scale, bool fixed_triu, OutTensor y) {
    constexpr double kMasked = -10000;
    put(y, at::softmax(at::masked_fill(up(x) * scale, mask.to(at::kBool), kMasked), -1));
})

ACLNN(LayerNorm, (Tensor input, Ints shape, Tensor weight, Tensor bias, double eps, OutTensor out, OutTensor mean, OutTensor rstd) {
    layer_norm(input, shape, weight, bias, eps, out, mean, rstd);
})
ACLNN(FastLayerNorm, (Tensor input, Ints shape, Tensor weight, Tensor bias, double eps, OutTensor out, OutTensor mean, OutTensor rstd) {
    layer_norm(input, shape, weight, bias, eps, out, mean, rstd);
})
ACLNN(GroupNorm, (Tensor self, Tensor gamma, Tensor beta, int64_t N, int64_t C, int64_t HxW, int64_t group, double eps,
                  OutTensor out, OutTensor mean, OutTensor rstd) {
    const auto result = group_norm(self, gamma, beta, group, eps);
    put(out, result.y);
    put_if_given(mean, result.mean);
    put_if_given(rstd, result.rstd);
})
ACLNN(GroupNormSilu, (Tensor self, Tensor gamma, Tensor beta, int64_t group, double eps, OutTensor out, OutTensor mean, OutTensor rstd) {
    const auto result = group_norm(self, gamma, beta, group, eps);
    put(out, at::silu(result.y));
    put_if_given(mean, result.mean);
    put_if_given(rstd, result.rstd);
})
ACLNN(GroupNormSwish, (Tensor self, Tensor gamma, Tensor beta, int64_t group, std::string data_format, double eps, bool activate,
                       double scale, OutTensor out, OutTensor mean, OutTensor rstd) {
    const auto result = group_norm(self, gamma, beta, group, eps);
    put(out, activate ? result.y * at::sigmoid(result.y * scale) : result.y);
    put_if_given(mean, result.mean);
    put_if_given(rstd, result.rstd);
})
// The running statistics move towards those of the batch where it trains.
ACLNN(BatchNorm, (Tensor input, Tensor weight, Tensor bias, OutTensor runningMean, OutTensor runningVar, bool training,
                  double momentum, double eps, OutTensor output, OutTensor saveMean, OutTensor saveInvstd) {
    const auto copy = [](const Tensor& x) { return x.defined() ? x.to(at::kFloat, false, true) : x; };
    const Tensor running_mean = copy(runningMean), running_var = copy(runningVar);
    const auto [y, mean, rstd] = at::native_batch_norm(up(input), up(weight), up(bias), running_mean, running_var, training, momentum, eps);
    put(output, y);
    if (!training) return;
    put(saveMean, mean);
    put(saveInvstd, rstd);
    put_if_given(runningMean, running_mean);
    put_if_given(runningVar, running_var);
})
ACLNN(RmsNorm, (Tensor x, Tensor gamma, double epsilon, OutTensor y, OutTensor rstd) {
    const auto [normed, scale] = rms_norm(x, gamma, epsilon);
    put(y, normed);
    put_if_given(rstd, scale);
})
ACLNN(AddRmsNorm, (Tensor x1, Tensor x2, Tensor gamma, double epsilon, OutTensor y, OutTensor rstd, OutTensor x) {
    put(x, up(x1) + up(x2));
    const auto [normed, scale] = rms_norm(x, gamma, epsilon);
    put(y, normed);
    put_if_given(rstd, scale);
})
// x1 becomes the normed sum, x2 the sum.
ACLNN(InplaceAddRmsNorm, (OutTensor x1, OutTensor x2, Tensor gamma, double epsilon, OutTensor rstd) {
    put(x2, up(x1) + up(x2));
    const auto [normed, scale] = rms_norm(x2, gamma, epsilon);
    put(x1, normed);
    put_if_given(rstd, scale);
})
ACLNN(GemmaRmsNorm, (Tensor x, Tensor gamma, double epsilon, OutTensor y, OutTensor rstd) {
    const auto [normed, scale] = rms_norm(x, up(gamma) + 1, epsilon);
    put(y, normed);
    put_if_given(rstd, scale);
})
ACLNN(AddLayerNorm, (Tensor x1, Tensor x2, Tensor gamma, Tensor beta, Tensor bias, double epsilon, bool additional_output,
                     OutTensor y, OutTensor mean, OutTensor rstd, OutTensor x) {
    const Tensor sum = bias.defined() ? up(x1) + up(x2) + up(bias) : up(x1) + up(x2);
    layer_norm(sum, gamma.sizes().vec(), gamma, beta, epsilon, y, mean, rstd);
    if (additional_output) put(x, sum);
})

ACLNN(RotaryPositionEmbedding, (Tensor x, Tensor cos, Tensor sin, int64_t mode, OutTensor out) { put(out, rotary(x, cos, sin, mode)); })
ACLNN(ApplyRotaryPosEmbV2, (OutTensor query, OutTensor key, Tensor cos, Tensor sin, int64_t layout, std::string mode) {
    const int64_t code = mode == "interleave" ? kInterleave : kHalf;
    put(query, rotary(query, cos, sin, code));
    put(key, rotary(key, cos, sin, code));
})
