// The layers of networks: matrix products, convolutions, normalisations, gates, resizing.
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

// Two dimensions of four in the order of NCHW.
Ints last_two(const Ints& four) { return {four.at(2), four.at(3)}; }

// A meta tensor has no convolution without Python.
Ints convolved_sizes(const Tensor& x, const Tensor& filter, const Ints& stride, const Ints& pads,
                     const Ints& dilation) {
    Ints sizes{x.size(0), filter.size(0)};
    for (int i = 0; i < 2; ++i) {
        const int64_t reach = dilation[i] * (filter.size(2 + i) - 1);
        sizes.push_back((x.size(2 + i) + pads[2 * i] + pads[2 * i + 1] - reach - 1) / stride[i] + 1);
    }
    return sizes;
}

Tensor convolution(const Operands& x) {
    x.integer("offset_x", 0);
    x.text("data_format", "NCHW");
    TORCH_CHECK(!x["offset_w"].defined(), "a quantised convolution is not emulated");
    const Ints stride = last_two(x.list("strides")), dilation = last_two(x.list("dilations", {1, 1, 1, 1}));
    const Ints pads = x.list("pads");
    const int64_t groups = x.integer("groups", 1);
    if (x.compiling()) return at::empty(convolved_sizes(x[0], x[1], stride, pads, dilation), x[0].options());
    TORCH_CHECK(pads[0] == pads[1] && pads[2] == pads[3], "a convolution with uneven padding is not emulated");
    const int8_t math = allows_hf32(Unit::kConvolution) ? kAllowLower : kKeep;
    const Tensor input = cube(x[0], math), filter = cube(x[1], math);
    const Tensor bias = x[2].defined() ? x[2].to(input.scalar_type()) : Tensor();
    return at::convolution(input, filter, bias, stride, {pads[0], pads[2]}, dilation, false, {0, 0}, groups);
}

Tensor transposed_convolution(const Operands& x) {
    x.integer("offset_x", 0);
    x.text("data_format", "NCHW");
    const Ints stride = last_two(x.list("strides")), dilation = last_two(x.list("dilations", {1, 1, 1, 1}));
    const Ints pads = x.list("pads");
    const Ints padding = last_two(x.list("output_padding", {0, 0, 0, 0}));
    const int64_t groups = x.integer("groups", 1);
    if (x.compiling()) return at::empty(x.ints(0), x[1].options());
    const int8_t math = allows_hf32(Unit::kConvolution) ? kAllowLower : kKeep;
    const Tensor input = cube(x[1], math), filter = cube(x[2], math);
    const Tensor bias = x[3].defined() ? x[3].to(input.scalar_type()) : Tensor();
    return at::convolution(input, filter, bias, stride, {pads[0], pads[2]}, dilation, true, padding, groups);
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

Tensor pooled(const Operands& x) {
    TORCH_CHECK(x.text("data_format", "NCHW") == "NCHW" && x.text("padding_mode", "CALCULATED") == "CALCULATED" &&
                !x.flag("global_pooling"), "this kind of pooling is not emulated");
    const Ints pads = x.list("pads", {0, 0, 0, 0});
    const int64_t divisor = x.integer("divisor_override", 0);
    const Ints window = last_two(x.list("ksize")), stride = last_two(x.list("strides"));
    const bool rounds_up = x.flag("ceil_mode"), counts_padding = !x.flag("exclusive", true);
    return at::avg_pool2d(x.up(0), window, stride, {pads[0], pads[2]}, rounds_up, counts_padding,
                          divisor == 0 ? std::nullopt : std::optional(divisor));
}

Tensor resized(const Operands& x) {
    TORCH_CHECK(!x.flag("align_corners") && !x.flag("half_pixel_centers"), "this kind of resizing is not emulated");
    return at::upsample_nearest2d(x[0], x.ints(1));
}

}  // namespace
}  // namespace cann::graph

GE(MatMul, product(x, "transpose_x1", "transpose_x2"))
GE(MatMulV2, product(x, "transpose_x1", "transpose_x2"))
GE(MatMulV3, product(x, "transpose_x1", "transpose_x2"))
GE(BatchMatMul, product(x, "adj_x1", "adj_x2"))
GE(BatchMatMulV2, product(x, "adj_x1", "adj_x2"))
GE(BatchMatMulV3, product(x, "adj_x1", "adj_x2"))
GE(Conv2D, convolution(x))
GE(Conv2DTranspose, transposed_convolution(x))

GE(SoftmaxV2, as(x.flag("half_to_float") ? at::kFloat : x[0].scalar_type(), softmax(x)))
GE(LogSoftmaxV2, at::log_softmax(x.up(0), x.list("axes", {-1}).at(0)))
GE(LayerNormV3, layer_norm_from_axis(x))
GE(LayerNormV4, layer_norm(x, x.ints(1), x[2], x[3]))
GE(GroupNorm, group_norm_with_variance(x))
GE(GroupNormV2, group_norm_with_deviation(x, false))
GE(GroupNormSilu, group_norm_with_deviation(x, true))
GE(RmsNorm, root_mean_square_norm(x))

GE(GLU, at::glu(x.up(0), x.integer("dim", -1)))
GE(SwiGlu, gated(x, [](const Tensor& gate) { return at::silu(gate); }))
GE(GeGluV2, geglu(x))
GE(RotaryMul, rotary(x[0], x[1], x[2], kHalf))
GE(RotaryPositionEmbedding, rotary(x[0], x[1], x[2], x.integer("mode", 0)))
GE(ApplyRotaryPosEmb, rotated_pair(x))
GE(AvgPoolV2, pooled(x))
GE_MOVES(ResizeNearestNeighborV2, resized(x))
