// Resizing, pooling and padding of images, and what they send back.
#include "ops/operator.h"

namespace cann {
namespace {

// A scale that is not positive stands for one that was not given.
std::optional<double> given(double scale) { return scale > 0 ? std::optional(scale) : std::nullopt; }
std::optional<int64_t> given(int64_t divisor) { return divisor == 0 ? std::nullopt : std::optional(divisor); }

struct Pooling {
    Pooling(const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation)
        : kernel(kernel), stride(stride.empty() ? kernel : stride), padding(padding), dilation(dilation) {}

    Ints kernel, stride, padding, dilation;
};

struct Places {
    Tensor rows, columns;  // [kernel, out height * out width], of the input
};

// What each element of the kernel reads for each result.
Places places(const Pooling& call, int64_t out_height, int64_t out_width) {
    const auto along = [&](int dim, int64_t out) {
        const Tensor from = at::arange(out) * call.stride.at(dim) - call.padding.at(dim);
        return at::arange(call.kernel.at(dim)).unsqueeze(-1) * call.dilation.at(dim) + from;  // [kernel, out]
    };
    const int64_t height = call.kernel.at(0), width = call.kernel.at(1);
    const Tensor rows = along(0, out_height).view({height, 1, out_height, 1});
    const Tensor columns = along(1, out_width).view({1, width, 1, out_width});
    const auto all = [&](const Tensor& x) { return x.expand({height, width, out_height, out_width}).flatten(0, 1).flatten(1); };
    return {all(rows), all(columns)};
}

// For each element of the kernel a row of bits, of which each says whether that result is the input there. Where the
// chip puts a bit is not documented: here the lowest of a byte is the first result.
void put_mask(const Tensor& mask, const Tensor& where, int64_t width, const Pooling& call) {
    const Places read = places(call, where.size(-2), where.size(-1));
    const Tensor found = where.flatten(-2).to(at::kInt), rows = found.floor_divide(width), columns = found.remainder(width);
    mask.zero_();
    for (int64_t i = 0; i < read.rows.size(0); ++i) {
        const Tensor bytes = pack_bits(at::eq(rows, read.rows[i]).logical_and(at::eq(columns, read.columns[i])));
        mask.select(-2, i).narrow(-1, 0, bytes.size(-1)).copy_(bytes.view(at::kChar));
    }
}

// The inverse.
Tensor where_of(const Tensor& mask, at::IntArrayRef sizes, int64_t width, const Pooling& call) {
    const Places read = places(call, sizes[sizes.size() - 2], sizes[sizes.size() - 1]);
    Tensor where = at::zeros(sizes, at::kLong).flatten(-2);
    for (int64_t i = 0; i < read.rows.size(0); ++i) {
        const int64_t results = where.size(-1), bytes = (results + 7) / 8;
        const Tensor row = mask.select(-2, i).narrow(-1, 0, bytes).contiguous().view(at::kByte);
        Ints bits = row.sizes().vec();
        bits.back() *= 8;
        where.add_(unpack_bits(row, bits).narrow(-1, 0, results) * (read.rows[i] * width + read.columns[i]));
    }
    return where.view(sizes);
}

}  // namespace
}  // namespace cann

FUNCTION(UpsampleNearest2dV2, (Tensor self, Ints size, float scale_h, float scale_w),
         at::upsample_nearest2d(self, size, given(scale_h), given(scale_w)))
FUNCTION(UpsampleNearest2dBackward,
         (Tensor gradOut, Ints outputSize, Ints inputSize, double scalesH, double scalesW),
         at::upsample_nearest2d_backward(up(gradOut), outputSize, inputSize, given(scalesH), given(scalesW)))
#define RESIZING(NAME, BACKWARD, F)                                                                                  \
    FUNCTION(NAME, (Tensor self, Ints size, bool align_corners, double scale_h, double scale_w),                     \
             F(up(self), size, align_corners, given(scale_h), given(scale_w)))                                       \
    FUNCTION(BACKWARD,                                                                                               \
             (Tensor gradOut, Ints outputSize, Ints inputSize, bool alignCorners, double scalesH, double scalesW),   \
             F##_backward(up(gradOut), outputSize, inputSize, alignCorners, given(scalesH), given(scalesW)))
RESIZING(UpsampleBilinear2d, UpsampleBilinear2dBackwardV2, at::upsample_bilinear2d)
RESIZING(UpsampleBicubic2d, UpsampleBicubic2dBackward, at::upsample_bicubic2d)

FUNCTION(AvgPool2d,
         (Tensor self, Ints kernel, Ints strides, Ints paddings, bool ceil_mode, bool count_include_pad, int64_t divisor,
          int8_t cube_math_type),
         at::avg_pool2d(up(self), kernel, strides, paddings, ceil_mode, count_include_pad, given(divisor)))
FUNCTION(AvgPool2dBackward,
         (Tensor gradOutput, Tensor self, Ints kernelSize, Ints stride, Ints padding, bool ceilMode, bool countIncludePad,
          int64_t divisorOverride, int8_t cubeMathType),
         at::avg_pool2d_backward(up(gradOutput), up(self), kernelSize, stride, padding, ceilMode, countIncludePad,
                                 given(divisorOverride)))
FUNCTION(AdaptiveAvgPool2d, (Tensor self, Ints outputSize), at::_adaptive_avg_pool2d(up(self), outputSize))
FUNCTION(AdaptiveAvgPool2dBackward, (Tensor gradOutput, Tensor self),
         at::_adaptive_avg_pool2d_backward(up(gradOutput), up(self)))
ACLNN(MaxPool2dWithMask, (Tensor self, Ints kernelSize, Ints stride, Ints padding, Ints dilation, bool ceilMode,
                          OutTensor out, OutTensor indices) {
    const Pooling call(kernelSize, stride, padding, dilation);
    const auto [values, where] = at::max_pool2d_with_indices(up(self), kernelSize, stride, padding, dilation, ceilMode);
    put(out, values);
    put_mask(indices, where, self.size(-1), call);
})
FUNCTION(MaxPool2dWithMaskBackward,
         (Tensor gradOutput, Tensor self, Tensor indices, Ints kernelSize, Ints stride, Ints padding, Ints dilation,
          bool ceilMode),
         at::max_pool2d_with_indices_backward(
             up(gradOutput), up(self), kernelSize, stride, padding, dilation, ceilMode,
             where_of(indices, gradOutput.sizes(), self.size(-1), {kernelSize, stride, padding, dilation})))

// Without the mask, behind `use_compatible_impl`.
ACLNN(MaxPool2dWithIndices, (Tensor self, Ints kernelSize, Ints stride, Ints padding, Ints dilation, bool ceilMode,
                             OutTensor out, OutTensor indices) {
    const auto [values, where] = at::max_pool2d_with_indices(up(self), kernelSize, stride, padding, dilation, ceilMode);
    put(out, values);
    move(indices, where);
})
FUNCTION(MaxPool2dWithIndicesBackward,
         (Tensor gradOutput, Tensor self, Tensor indices, Ints kernelSize, Ints stride, Ints padding, Ints dilation,
          bool ceilMode),
         at::max_pool2d_with_indices_backward(up(gradOutput), up(self), kernelSize, stride, padding, dilation, ceilMode,
                                              indices.to(at::kLong)))

#define PADDING(NAME, F)                                                                    \
    FUNCTION(NAME, (Tensor self, Ints padding), F(self, padding))                           \
    FUNCTION(NAME##Backward, (Tensor gradOutput, Tensor self, Ints padding),                \
             F##_backward(up(gradOutput), up(self), padding))
PADDING(ReflectionPad1d, at::reflection_pad1d)
PADDING(ReflectionPad2d, at::reflection_pad2d)
PADDING(ReflectionPad3d, at::reflection_pad3d)
PADDING(ReplicationPad1d, at::replication_pad1d)
PADDING(ReplicationPad2d, at::replication_pad2d)
PADDING(ReplicationPad3d, at::replication_pad3d)
