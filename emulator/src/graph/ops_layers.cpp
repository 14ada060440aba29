// The layers of networks: matrix products, convolutions, normalisations, gates.
#include "graph/hf32.h"
#include "graph/shapes.h"
#include "ops/shared.h"

namespace cann::graph {
namespace {

constexpr int8_t kKeep = 0, kAllowLower = 1;  // cube_math_type

Tensor operand(const Tensor& matrix, bool transposed) {
    const Tensor exact = cube(matrix, allows_hf32(Unit::kMatrix) ? kAllowLower : kKeep);
    return transposed ? exact.transpose(-1, -2) : exact;
}

Tensor product(const Operands& x, const char* transposed_1, const char* transposed_2) {
    x.integer("offset_x", 0);
    TORCH_CHECK(!x["offset_w"].defined(), "a product of quantised matrices is not emulated");
    const Tensor a = operand(x[0], x.flag(transposed_1)), b = operand(x[1], x.flag(transposed_2));
    if (a.dim() == 1 && b.dim() == 1) return at::matmul(a.unsqueeze(0), b).squeeze(0);
    if (!x[2].defined()) return at::matmul(a, b);
    return at::matmul(up(a), up(b)) + x.up(2);  // one rounding: one of 16 bits would come before the addition
}

Tensor weight_quant_product(const Operands& x) {
    x.integer("dtype", -1);
    x.integer("inner_precise", 0);  // a choice of speed
    TORCH_CHECK(!x[4].defined() && !x[5].defined(), "quantised results are not emulated");
    const Tensor left = x.flag("transpose_x") ? x[0].transpose(-1, -2) : x[0];
    const Tensor weight = x.flag("transpose_weight") ? x[1].transpose(-1, -2) : x[1];
    return cann::weight_quant_product(left, weight, x[2].to(left.scalar_type()), x[3], x[6],
                                      x.integer("antiquant_group_size", 0));
}

// What follows batch and channels: the tensors are [N, C, ...].
Ints spatial(const Ints& values) { return {values.begin() + 2, values.end()}; }

// The attributes of a convolution. Two or three dimensions make one kernel.
struct Window {
    Window(const Operands& x, size_t rank) {
        x.integer("offset_x", 0);
        const std::string format = rank == 4 ? "NCHW" : "NCDHW";
        TORCH_CHECK(x.text("data_format", "NCHW") == format, "a convolution of another order is not emulated");
        TORCH_CHECK(!x["offset_w"].defined(), "a quantised convolution is not emulated");
        stride = spatial(x.list("strides"));
        dilation = spatial(x.list("dilations", Ints(rank, 1)));
        groups = x.integer("groups", 1);
        const Ints pads = x.list("pads");
        for (size_t i = 0; i < pads.size(); i += 2) {
            before.push_back(pads[i]);
            after.push_back(pads[i + 1]);
        }
    }

    // The padding that is the same on both sides.
    Ints even() const {
        Ints least;
        for (size_t i = 0; i < before.size(); ++i) least.push_back(std::min(before[i], after[i]));
        return least;
    }

    // A map with the rest of it.
    Tensor with_uneven(const Tensor& x) const {
        if (before == after) return x;
        Ints rest;
        for (size_t i = before.size(); i-- > 0;) {
            const int64_t both = std::min(before[i], after[i]);
            rest.push_back(before[i] - both);
            rest.push_back(after[i] - both);
        }
        return at::constant_pad_nd(x, rest);
    }

    Ints stride, dilation, before, after;  // before and after: padding
    int64_t groups;
};

// A meta tensor has no convolution without Python.
Ints convolved_sizes(const Tensor& x, const Tensor& filter, const Window& window) {
    Ints sizes{x.size(0), filter.size(0)};
    for (size_t i = 0; i < window.stride.size(); ++i) {
        const int64_t reach = window.dilation[i] * (filter.size(2 + i) - 1);
        sizes.push_back((x.size(2 + i) + window.before[i] + window.after[i] - reach - 1) / window.stride[i] + 1);
    }
    return sizes;
}

Tensor convolved(const Tensor& x, const Tensor& filter, const Tensor& bias, const Window& window, bool transposed,
                 const Ints& output_padding) {
    const int8_t math = allows_hf32(Unit::kConvolution) ? kAllowLower : kKeep;
    const Tensor input = cube(x, math);
    return at::convolution(input, cube(filter, math), bias.defined() ? bias.to(input.scalar_type()) : Tensor(),
                           window.stride, window.even(), window.dilation, transposed, output_padding, window.groups);
}

Tensor convolution(const Operands& x) {
    const Window window(x, x[0].dim());
    if (x.compiling()) return at::empty(convolved_sizes(x[0], x[1], window), x[0].options());
    return convolved(window.with_uneven(x[0]), x[1], x[2], window, false, Ints(window.stride.size(), 0));
}

Tensor transposed_convolution(const Operands& x) {
    const Window window(x, x[1].dim());
    const Ints padding = spatial(x.list("output_padding", Ints(x[1].dim(), 0)));
    TORCH_CHECK(window.before == window.after, "a transposed convolution with uneven padding is not emulated");
    if (x.compiling()) return at::empty(x.ints(0), x[1].options());
    return convolved(x[1], x[2], x[3], window, true, padding);
}

// Before opset 13, ONNX means all dimensions from the axis on, of which its parser leaves this sign.
Tensor over_axes(const Operands& x, int64_t axis, Tensor (*function)(const Tensor&, int64_t)) {
    if (!x.flag("need_fusion")) return function(x.up(0), axis);
    if (axis < 0) axis += x[0].dim();
    return function(x.up(0).flatten(axis), axis).reshape(x[0].sizes());
}

Tensor softmax(const Operands& x) {
    const Ints axes = x.list("axes", {-1});
    TORCH_CHECK(axes.size() == 1, "a softmax over several dimensions is not emulated");
    return over_axes(x, axes[0], [](const Tensor& value, int64_t dim) { return at::softmax(value, dim); });
}

Tensor log_softmax(const Operands& x) {
    return over_axes(x, x.list("axes", {-1}).at(0),
                     [](const Tensor& value, int64_t dim) { return at::log_softmax(value, dim); });
}

// The sizes of a tensor with 1 for its last dimensions.
Ints with_ones(const Tensor& x, size_t last) {
    Ints sizes = x.sizes().vec();
    std::fill(sizes.end() - static_cast<int64_t>(last), sizes.end(), 1);
    return sizes;
}

// Statistics are float32 for operands of other dtypes than gamma's, and of 16 bits otherwise.
Results layer_norm(const Operands& x, const Ints& shape, const Tensor& gamma, const Tensor& beta) {
    const double epsilon = x.real("epsilon", 1e-5);
    if (x.compiling()) {
        const Tensor statistics = shaped(with_ones(x[0], shape.size()), at::kFloat);
        return {x.up(0), as(at::kFloat, statistics), as(at::kFloat, statistics)};
    }
    const auto [y, mean, rstd] = at::native_layer_norm(x.up(0), shape, up(gamma), up(beta), epsilon);
    return {y, as(at::kFloat, mean), as(at::kFloat, rstd)};
}

Ints sizes_from(const Tensor& x, int64_t axis) {
    return {x.sizes().begin() + (axis < 0 ? axis + x.dim() : axis), x.sizes().end()};
}

Results layer_norm_from_axis(const Operands& x) {
    x.integer("begin_params_axis", 0);
    return layer_norm(x, sizes_from(x[0], x.integer("begin_norm_axis", 0)), x[1], x[2]);
}

// Over the last dimensions: mean and variance. Scale and shift are broadcast.
Results normed(const Operands& x, size_t last, double epsilon, const Tensor& gamma, const Tensor& beta) {
    const Tensor wide = x.up(0);
    if (x.compiling()) {
        const Tensor statistics = shaped(with_ones(wide, last), wide.scalar_type());
        return {wide, statistics, statistics};
    }
    Ints dims;
    for (size_t i = 0; i < last; ++i) dims.push_back(wide.dim() - 1 - static_cast<int64_t>(i));
    const auto [variance, mean] = at::var_mean(wide, dims, at::Scalar(0), true);
    return {(wide - mean) * at::rsqrt(variance + epsilon) * up(gamma) + up(beta), mean, variance};
}

Results layer_norm_with_variance(const Operands& x) {
    x.integer("begin_params_axis", 0);
    const size_t last = sizes_from(x[0], x.integer("begin_norm_axis", 0)).size();
    return normed(x, last, x.real("epsilon", 1e-7), x[1], x[2]);
}

// A vector of the channels as they lie in x, [N, C, ...].
Tensor by_channel(const Operands& x, size_t operand) {
    Ints sizes(x[0].dim(), 1);
    sizes.at(1) = -1;
    return x.up(operand).reshape(sizes);
}

Results instance_norm(const Operands& x) {
    TORCH_CHECK(x.text("data_format", "NDHWC") == "NCHW", "an InstanceNorm of another order is not emulated");
    return normed(x, x[0].dim() - 2, x.real("epsilon", 1e-7), by_channel(x, 1), by_channel(x, 2));
}

// With the statistics that are given.
Tensor batch_norm(const Operands& x) {
    TORCH_CHECK(!x.flag("is_training", true) && x.text("data_format", "NHWC") == "NCHW",
                "this kind of BatchNorm is not emulated");
    const Tensor scale = at::rsqrt(by_channel(x, 4) + x.real("epsilon", 1e-4)) * by_channel(x, 1);
    return (x.up(0) - by_channel(x, 3)) * scale + by_channel(x, 2);
}

GroupNormResult group_norm(const Operands& x) {
    x.flag("is_training", true);
    x.text("data_format", "NCHW");  // torchair leaves the default there, and describes the tensors as NCHW
    const int64_t groups = x.integer("num_groups");
    const double epsilon = x.real("eps", 1e-5);
    if (!x.compiling()) return cann::group_norm(x[0], x[1], x[2], groups, epsilon);
    const Tensor statistics = shaped({x[0].size(0), groups}, at::kFloat);
    return {x.up(0), statistics, statistics};
}

// The first edition returns the variance, the others 1 / deviation.
Results group_norm_with_variance(const Operands& x) {
    const auto [y, mean, rstd] = group_norm(x);
    return {y, mean, rstd.pow(-2) - x.real("eps", 1e-4)};
}

Results group_norm_with_deviation(const Operands& x, bool activated) {
    const auto [y, mean, rstd] = group_norm(x);
    return {activated ? at::silu(y) : y, mean, rstd};
}

Results root_mean_square_norm(const Operands& x) {
    const auto [y, rstd] = rms_norm(x[0], x[1], x.real("epsilon", 1e-6));
    return {y, as(at::kFloat, rstd)};
}

// The sum is normed as it is stored.
Results added_and_normed(const Operands& x) {
    const Tensor sum = at::empty_like(x[0]);
    if (!x.compiling()) put(sum, x.up(0) + x.up(1));
    const auto [y, rstd] = rms_norm(sum, x[2], x.real("epsilon", 1e-6));
    return {y, as(at::kFloat, rstd), sum};
}

// The sum is normed as it is before it is rounded, and stored where it is asked for.
Results added_and_layer_normed(const Operands& x) {
    const ScalarType dtype = at::promote_types(x[0].scalar_type(), x[1].scalar_type());
    Tensor sum = x.up(0) + x.up(1);
    if (x[4].defined()) sum = sum + x.up(4);
    const Ints shape = x[2].sizes().vec();
    const double epsilon = x.real("epsilon", 1e-5);
    const Tensor stored = x.flag("additional_output") ? sum : at::full_like(sum, NAN);
    if (x.compiling()) {
        const Tensor statistics = shaped(with_ones(sum, shape.size()), at::kFloat);
        return {as(dtype, sum), as(at::kFloat, statistics), as(at::kFloat, statistics), as(dtype, stored)};
    }
    const auto [y, mean, rstd] = at::native_layer_norm(sum, shape, x.up(2), x.up(3), epsilon);
    return {as(dtype, y), as(at::kFloat, mean), as(at::kFloat, rstd), as(dtype, stored)};
}

Tensor gated(const Operands& x, Tensor (*gate)(const Tensor&)) {
    const auto [first, second] = halves(x[0], x.integer("dim", -1));
    return gate(first) * second;
}

Results geglu(const Operands& x) {
    const auto [left, right] = halves(x[0], x.integer("dim", -1));
    const bool left_is_gate = x.flag("activate_left");
    const Tensor gate = at::gelu(left_is_gate ? left : right, x.integer("approximate", 1) == 1 ? "tanh" : "none");
    return {gate * (left_is_gate ? right : left), gate};
}

Results rotated_pair(const Operands& x) {
    x.integer("layout", 1);
    const int64_t mode = x.text("rotary_mode", "half") == "interleave" ? kInterleave : kHalf;
    return {rotary(x[0], x[2], x[3], mode), rotary(x[1], x[2], x[3], mode)};
}

}  // namespace
}  // namespace cann::graph

GE(MatMul, product(x, "transpose_x1", "transpose_x2"))
GE(MatMulV2, product(x, "transpose_x1", "transpose_x2"))
GE(MatMulV3, product(x, "transpose_x1", "transpose_x2"))
GE(BatchMatMul, product(x, "adj_x1", "adj_x2"))
GE(BatchMatMulV2, product(x, "adj_x1", "adj_x2"))
GE(BatchMatMulV3, product(x, "adj_x1", "adj_x2"))
GE(WeightQuantBatchMatmulV2, as(x[0].scalar_type(), weight_quant_product(x)))
GE(Conv2D, convolution(x))
GE(Conv2DTranspose, transposed_convolution(x))
GE(Conv3D, convolution(x))
GE(Conv3DTranspose, transposed_convolution(x))

GE(SoftmaxV2, as(x.flag("half_to_float") ? at::kFloat : x[0].scalar_type(), softmax(x)))
GE(LogSoftmaxV2, log_softmax(x))
GE(LayerNorm, layer_norm_with_variance(x))
GE(LayerNormV3, layer_norm_from_axis(x))
GE(LayerNormV4, layer_norm(x, x.ints(1), x[2], x[3]))
GE(InstanceNorm, instance_norm(x))
GE(BatchNorm, batch_norm(x))
GE(GroupNorm, group_norm_with_variance(x))
GE(GroupNormV2, group_norm_with_deviation(x, false))
GE(GroupNormSilu, group_norm_with_deviation(x, true))
GE(RmsNorm, root_mean_square_norm(x))
GE(AddRmsNorm, added_and_normed(x))
GE(AddLayerNorm, added_and_layer_normed(x))

GE(GLU, at::glu(x.up(0), x.integer("dim", -1)))
GE(SwiGlu, gated(x, [](const Tensor& gate) { return at::silu(gate); }))
GE(GeGluV2, geglu(x))
GE(RotaryMul, rotary(x[0], x[1], x[2], kHalf))
GE(RotaryPositionEmbedding, rotary(x[0], x[1], x[2], x.integer("mode", 0)))
GE(ApplyRotaryPosEmb, rotated_pair(x))
