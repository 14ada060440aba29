// The layers of networks: matrix products, convolutions, normalisations, gates.
#include "graph/operation.h"
#include "graph/hf32.h"
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
            TORCH_CHECK(pads[i] == pads[i + 1], "a convolution with uneven padding is not emulated");
            padding.push_back(pads[i]);
        }
    }

    Ints stride, dilation, padding;
    int64_t groups;
};

// A meta tensor has no convolution without Python.
Ints convolved_sizes(const Tensor& x, const Tensor& filter, const Window& window) {
    Ints sizes{x.size(0), filter.size(0)};
    for (size_t i = 0; i < window.stride.size(); ++i) {
        const int64_t reach = window.dilation[i] * (filter.size(2 + i) - 1);
        sizes.push_back((x.size(2 + i) + 2 * window.padding[i] - reach - 1) / window.stride[i] + 1);
    }
    return sizes;
}

Tensor convolved(const Tensor& x, const Tensor& filter, const Tensor& bias, const Window& window, bool transposed,
                 const Ints& output_padding) {
    const int8_t math = allows_hf32(Unit::kConvolution) ? kAllowLower : kKeep;
    const Tensor input = cube(x, math);
    return at::convolution(input, cube(filter, math), bias.defined() ? bias.to(input.scalar_type()) : Tensor(),
                           window.stride, window.padding, window.dilation, transposed, output_padding, window.groups);
}

Tensor convolution(const Operands& x) {
    const Window window(x, x[0].dim());
    if (x.compiling()) return at::empty(convolved_sizes(x[0], x[1], window), x[0].options());
    return convolved(x[0], x[1], x[2], window, false, Ints(window.stride.size(), 0));
}

Tensor transposed_convolution(const Operands& x) {
    const Window window(x, x[1].dim());
    const Ints padding = spatial(x.list("output_padding", Ints(x[1].dim(), 0)));
    if (x.compiling()) return at::empty(x.ints(0), x[1].options());
    return convolved(x[1], x[2], x[3], window, true, padding);
}

Tensor softmax(const Operands& x) {
    const Ints axes = x.list("axes", {-1});
    TORCH_CHECK(axes.size() == 1, "a softmax over several dimensions is not emulated");
    return at::softmax(x.up(0), axes[0]);
}

// Statistics are float32 for operands of other dtypes than gamma's, and of 16 bits otherwise.
Results layer_norm(const Operands& x, const Ints& shape, const Tensor& gamma, const Tensor& beta) {
    const auto [y, mean, rstd] = at::native_layer_norm(x.up(0), shape, up(gamma), up(beta), x.real("epsilon", 1e-5));
    return {y, as(at::kFloat, mean), as(at::kFloat, rstd)};
}

Ints sizes_from(const Tensor& x, int64_t axis) {
    return {x.sizes().begin() + (axis < 0 ? axis + x.dim() : axis), x.sizes().end()};
}

Results layer_norm_from_axis(const Operands& x) {
    x.integer("begin_params_axis", 0);
    return layer_norm(x, sizes_from(x[0], x.integer("begin_norm_axis", 0)), x[1], x[2]);
}

GroupNormResult group_norm(const Operands& x) {
    x.flag("is_training", true);
    x.text("data_format", "NCHW");  // torchair leaves the default there, and describes the tensors as NCHW
    return cann::group_norm(x[0], x[1], x[2], x.integer("num_groups"), x.real("eps", 1e-5));
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
GE(LogSoftmaxV2, at::log_softmax(x.up(0), x.list("axes", {-1}).at(0)))
GE(LayerNormV3, layer_norm_from_axis(x))
GE(LayerNormV4, layer_norm(x, x.ints(1), x[2], x[3]))
GE(GroupNorm, group_norm_with_variance(x))
GE(GroupNormV2, group_norm_with_deviation(x, false))
GE(GroupNormSilu, group_norm_with_deviation(x, true))
GE(RmsNorm, root_mean_square_norm(x))
GE(AddRmsNorm, added_and_normed(x))

GE(GLU, at::glu(x.up(0), x.integer("dim", -1)))
GE(SwiGlu, gated(x, [](const Tensor& gate) { return at::silu(gate); }))
GE(GeGluV2, geglu(x))
GE(RotaryMul, rotary(x[0], x[1], x[2], kHalf))
GE(RotaryPositionEmbedding, rotary(x[0], x[1], x[2], x.integer("mode", 0)))
GE(ApplyRotaryPosEmb, rotated_pair(x))
