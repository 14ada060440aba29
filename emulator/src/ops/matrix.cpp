// The matrix unit: products and convolutions with float32 sums (numerics.h says what becomes of the operands).
#include "ops/gradients.h"
#include "ops/shared.h"

namespace cann {
namespace {

Tensor add_product(const Tensor& self, const Tensor& product, const Scalar& beta, const Scalar& alpha) {
    const Tensor scaled = alpha.equal(1) ? product : product * alpha;
    // As in torch, a beta of 0 ignores NaN and infinity in `self`.
    return beta.equal(0) ? scaled : scaled + up(self) * beta;
}

Tensor addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const Scalar& beta, const Scalar& alpha, int8_t math) {
    const Tensor left = cube(mat1, math), right = cube(mat2, math);
    // One rounding only: a product in 16 bits would be rounded before the addition.
    if (left.scalar_type() == at::kFloat) return add_product(self, at::mm(left, right), beta, alpha);
    return at::addmm(self, left, right, beta, alpha);
}

Tensor baddbmm(const Tensor& self, const Tensor& batch1, const Tensor& batch2, const Scalar& beta, const Scalar& alpha, int8_t math) {
    const Tensor left = cube(batch1, math), right = cube(batch2, math);
    if (left.scalar_type() == at::kFloat) return add_product(self, at::bmm(left, right), beta, alpha);
    return at::baddbmm(self, left, right, beta, alpha);
}

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

// A scale of [groups, N] for each row of a weight of [K, N]; of one group it spreads by itself.
Tensor spread(const Tensor& scale, int64_t group_size, int64_t rows) {
    return group_size == 0 ? up(scale) : up(scale).repeat_interleave(group_size, 0).narrow(0, 0, rows);
}

}  // namespace

// The vector unit makes the weight one of x's dtype, and the matrix unit takes it from there (ops-nn,
// weight_quant_batch_matmul_v2/op_kernel: _custom.h of 910B, _weight_nz_performance.h of 310P).
Tensor weight_quant_product(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& offset,
                            const Tensor& bias, int64_t group_size) {
    TORCH_CHECK(weight.scalar_type() == at::kChar, "weights of other dtypes than int8 are not emulated");
    TORCH_CHECK(scale.is_floating_point(), "an antiquant_scale of integers is not emulated");
    const int64_t rows = weight.size(-2);
    Tensor exact = weight.to(at::kFloat);
    if (offset.defined()) exact = exact + spread(offset, group_size, rows);
    const Tensor dequantised = (exact * spread(scale, group_size, rows)).to(x.scalar_type());
    if (!bias.defined()) return at::matmul(cube(x, 0), cube(dequantised, 0));
    return at::matmul(up(x), up(dequantised)) + up(bias);  // one rounding: one of 16 bits would come before the addition
}
}  // namespace cann

#define PRODUCT(NAME, F)                                                                     \
    ACLNN(NAME, (Tensor self, Tensor mat2, OutTensor out, int8_t cube_math_type) {              \
        put(out, F(cube(self, cube_math_type), cube(mat2, cube_math_type)));                 \
    })
PRODUCT(Mm, at::mm)
PRODUCT(Matmul, at::matmul)
PRODUCT(MatmulWeightNz, at::matmul)
PRODUCT(BatchMatMul, at::matmul)  // a batch of one serves all of the other
ACLNN(Mv, (Tensor self, Tensor vec, OutTensor out, int8_t cube_math_type) {
    put(out, at::mv(cube(self, cube_math_type), cube(vec, cube_math_type)));
})
FUNCTION(Dot, (Tensor self, Tensor tensor), at::dot(up(self), up(tensor)))
FUNCTION(Addr, (Tensor self, Tensor vec1, Tensor vec2, Scalar beta, Scalar alpha), at::addr(self, vec1, vec2, beta, alpha))
INPLACE(Addr, (Tensor self, Tensor vec1, Tensor vec2, Scalar beta, Scalar alpha), at::addr(self, vec1, vec2, beta, alpha))

ACLNN(Addmm, (Tensor self, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha, OutTensor out, int8_t cube_math_type) {
    put(out, addmm(self, mat1, mat2, beta, alpha, cube_math_type));
})
ACLNN(AddmmWeightNz, (Tensor self, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha, OutTensor out, int8_t cube_math_type) {
    put(out, addmm(self, mat1, mat2, beta, alpha, cube_math_type));
})
ACLNN(InplaceAddmm, (OutTensor self, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha, int8_t cube_math_type) {
    put(self, addmm(self, mat1, mat2, beta, alpha, cube_math_type));
})
ACLNN(Addmv, (Tensor self, Tensor mat, Tensor vec, Scalar alpha, Scalar beta, OutTensor out, int8_t cube_math_type) {
    put(out, add_product(self, at::mv(up(cube(mat, cube_math_type)), up(cube(vec, cube_math_type))), beta, alpha));
})
ACLNN(Baddbmm, (Tensor self, Tensor batch1, Tensor batch2, Scalar beta, Scalar alpha, OutTensor out, int8_t cube_math_type) {
    put(out, baddbmm(self, batch1, batch2, beta, alpha, cube_math_type));
})
ACLNN(Addbmm, (Tensor self, Tensor batch1, Tensor batch2, Scalar beta, Scalar alpha, OutTensor out, int8_t cube_math_type) {
    const Tensor product = at::bmm(up(cube(batch1, cube_math_type)), up(cube(batch2, cube_math_type))).sum(0);
    put(out, add_product(self, product, beta, alpha));
})

#define WEIGHT_QUANT_TENSORS                                                                                  \
    Tensor x, Tensor weight, Tensor antiquantScale, Tensor antiquantOffsetOptional, Tensor quantScaleOptional, \
        Tensor quantOffsetOptional, Tensor biasOptional
// The third edition adds `innerPrecise`, a choice of speed.
ACLNN(WeightQuantBatchMatmulV2, (WEIGHT_QUANT_TENSORS, int antiquantGroupSize, OutTensor y) {
    refuse_any({quantScaleOptional, quantOffsetOptional});
    put(y, weight_quant_product(x, weight, antiquantScale, antiquantOffsetOptional, biasOptional, antiquantGroupSize));
})
ACLNN(WeightQuantBatchMatmulV3, (WEIGHT_QUANT_TENSORS, int antiquantGroupSize, int innerPrecise, OutTensor y) {
    refuse_any({quantScaleOptional, quantOffsetOptional});
    put(y, weight_quant_product(x, weight, antiquantScale, antiquantOffsetOptional, biasOptional, antiquantGroupSize));
})

ACLNN(Convolution, (Tensor input, Tensor weight, Tensor bias, Ints stride, Ints padding, Ints dilation, bool transposed,
                    Ints outputPadding, int64_t groups, OutTensor output, int8_t cubeMathType) {
    const Tensor x = cube(input, cubeMathType), kernel = cube(weight, cubeMathType);
    const Tensor offset = bias.defined() ? bias.to(x.scalar_type()) : bias;
    put(output, at::convolution(x, kernel, offset, stride, padding, dilation, transposed, outputPadding, groups));
})
ACLNN(ConvolutionBackward, (Tensor gradOutput, Tensor input, Tensor weight, MaybeInts biasSizes, Ints stride,
                            Ints padding, Ints dilation, bool transposed, Ints outputPadding, int groups,
                            Bools outputMask, int8_t cubeMathType, OutTensor gradInput, OutTensor gradWeight,
                            OutTensor gradBias) {
    put_gradients(convolution_backward(gradOutput, input, weight, stride, padding, dilation, transposed, outputPadding,
                                       groups, asked(outputMask), cubeMathType),
                  gradInput, gradWeight, gradBias);
})
