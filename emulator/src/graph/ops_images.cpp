// Pooling, resizing, sampling.
#include "graph/operation.h"
#include "graph/shapes.h"

namespace cann::graph {
namespace {

// Of four dimensions in the order of NCHW.
Ints last_two(const Ints& four) { return {four.at(2), four.at(3)}; }

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

// The sizes of a tensor with others in its last dimensions.
Ints with_last(const Tensor& x, const Ints& sizes) {
    Ints result = x.sizes().vec();
    std::copy(sizes.begin(), sizes.end(), result.end() - static_cast<int64_t>(sizes.size()));
    return result;
}

Tensor adaptively_pooled(const Operands& x) {
    const Ints sizes = x.list("output_size");
    return x.compiling() ? x.up(0).new_empty(with_last(x[0], sizes)) : at::_adaptive_avg_pool2d(x.up(0), sizes);
}

// What the coordinates of `now` pixels are among those of `before`.
Tensor coordinates(int64_t before, int64_t now, bool corners, bool centers) {
    const Tensor places = at::arange(now, at::kDouble);
    if (corners) return places * (now > 1 ? static_cast<double>(before - 1) / static_cast<double>(now - 1) : 0.0);
    const double factor = static_cast<double>(before) / static_cast<double>(now);
    return centers ? (places + 0.5) * factor - 0.5 : places * factor;
}

// The pixels that ONNX means.
Tensor rounded(const Tensor& places, const std::string& mode) {
    if (mode == "floor") return at::floor(places);
    if (mode == "ceil") return at::ceil(places);
    return mode == "round_prefer_ceil" ? at::floor(places + 0.5) : at::ceil(places - 0.5);
}

// The pixels that the operator takes, whatever the model says of rounding: where that is lost, it must not matter.
Tensor nearest(const Operands& x, int64_t before, int64_t now) {
    const bool corners = x.flag("align_corners"), centers = x.flag("half_pixel_centers");
    const std::string meant = x.text("_onnx_nearest_mode", "");
    const Tensor places = coordinates(before, now, corners, centers);
    const auto inside = [&](const Tensor& pixels) { return at::clamp(pixels, 0, before - 1).to(at::kLong); };
    const Tensor taken = inside(at::floor(corners || centers ? places + 0.5 : places));
    TORCH_CHECK(meant.empty() || at::equal(taken, inside(rounded(places, meant))),
                "the model's nearest_mode ", meant, " would change the result, but CANN's parser does not read it");
    return taken;
}

Tensor resized(const Operands& x) {
    const Ints sizes = x.ints(1);
    const Tensor rows = nearest(x, x[0].size(2), sizes.at(0)), columns = nearest(x, x[0].size(3), sizes.at(1));
    if (x.compiling()) return shaped({x[0].size(0), x[0].size(1), sizes[0], sizes[1]}, x[0].scalar_type());
    return at::index_select(at::index_select(x[0], 2, rows), 3, columns);
}

// torch counts the modes.
int64_t index_of(const std::string& mode, const std::vector<std::string>& modes) {
    const auto found = std::find(modes.begin(), modes.end(), mode);
    TORCH_CHECK(found != modes.end(), "sampling by ", mode, " is not emulated");
    return found - modes.begin();
}

Tensor sampled(const Operands& x) {
    const int64_t between = index_of(x.text("interpolation_mode", "bilinear"), {"bilinear", "nearest", "bicubic"});
    const int64_t outside = index_of(x.text("padding_mode", "zeros"), {"zeros", "border", "reflection"});
    const bool aligned = x.flag("align_corners");
    x.text("data_format", "NCDHW");  // the one that there is; of three dimensions only
    const Ints sizes(x[1].sizes().begin() + 1, x[1].sizes().end() - 1);
    if (x.compiling()) return x.up(0).new_empty(with_last(x[0], sizes));
    return at::grid_sampler(x.up(0), x.up(1), between, outside, aligned);
}

}  // namespace
}  // namespace cann::graph

GE(AvgPoolV2, pooled(x))
GE(AdaptiveAvgPool2d, adaptively_pooled(x))
GE_MOVES(ResizeNearestNeighborV2, resized(x))
GE(GridSampler2D, sampled(x))
GE(GridSampler3D, sampled(x))
