// What convolutions, resizing, pooling and padding of images send back.
#include "ops/gradients.h"

namespace cann {
namespace {

// The matrix unit makes the gradients of input and weight, the vector unit sums those of the bias.
Gradients convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& stride,
                               const Ints& padding, const Ints& dilation, bool transposed, const Ints& output_padding,
                               int64_t groups, const Asked& mask, int8_t math) {
    const auto operand = [math](const Tensor& tensor) { return up(cube(tensor, math)); };
    auto [of_x, of_weight, of_bias] = at::convolution_backward(operand(grad), operand(x), operand(weight), std::nullopt,
                                                               stride, padding, dilation, transposed, output_padding,
                                                               groups, {mask[0], mask[1], false});
    if (mask[2]) {
        Ints but_channels{0};
        for (int64_t dim = 2; dim < grad.dim(); ++dim) but_channels.push_back(dim);
        of_bias = up(grad).sum(but_channels);
    }
    return {of_x, of_weight, of_bias};
}

// A scale that is not positive stands for one that was not given.
std::optional<double> given(double scale) { return scale > 0 ? std::optional(scale) : std::nullopt; }

}  // namespace
}  // namespace cann

ACLNN(ConvolutionBackward, (Tensor gradOutput, Tensor input, Tensor weight, MaybeInts biasSizes, Ints stride,
                            Ints padding, Ints dilation, bool transposed, Ints outputPadding, int groups,
                            Bools outputMask, int8_t cubeMathType, OutTensor gradInput, OutTensor gradWeight,
                            OutTensor gradBias) {
    put_gradients(convolution_backward(gradOutput, input, weight, stride, padding, dilation, transposed, outputPadding,
                                       groups, asked(outputMask), cubeMathType),
                  gradInput, gradWeight, gradBias);
})

FUNCTION(UpsampleNearest2dBackward,
         (Tensor gradOut, Ints outputSize, Ints inputSize, double scalesH, double scalesW),
         at::upsample_nearest2d_backward(up(gradOut), outputSize, inputSize, given(scalesH), given(scalesW)))
#define RESIZING_BACKWARD(NAME, F)                                                                                       \
    FUNCTION(NAME, (Tensor gradOut, Ints outputSize, Ints inputSize, bool alignCorners, double scalesH, double scalesW), \
             F(up(gradOut), outputSize, inputSize, alignCorners, given(scalesH), given(scalesW)))
RESIZING_BACKWARD(UpsampleBilinear2dBackwardV2, at::upsample_bilinear2d_backward)
RESIZING_BACKWARD(UpsampleBicubic2dBackward, at::upsample_bicubic2d_backward)
FUNCTION(AvgPool2dBackward,
         (Tensor gradOutput, Tensor self, Ints kernelSize, Ints stride, Ints padding, bool ceilMode, bool countIncludePad,
          int64_t divisorOverride, int8_t cubeMathType),
         at::avg_pool2d_backward(up(gradOutput), up(self), kernelSize, stride, padding, ceilMode, countIncludePad,
                                 divisorOverride == 0 ? std::nullopt : std::optional(divisorOverride)))
