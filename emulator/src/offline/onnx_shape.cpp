// What only moves values: shapes, permutations, joins and splits, slices, gathers, constants.
#include "offline/onnx_operator.h"
#include "ops/tensor.h"

namespace cann::offline {
namespace {

void shape(Translation& x) {
    const bool part = x.integer("start", 0) != 0 || x.has("end");
    x.integer("end", 0);
    if (part) {
        x.refuse("CANN's parser reads a Shape without its `start` and `end`, so that all sizes would be taken for some: "
                 "export the model with a fixed batch");
    }
    x.last("Shape", {{"x", x[0]}}, {{"dtype", int64_t{ACL_INT64}}});
}

void transpose(Translation& x) {
    const Ints order = x.list("perm");
    if (order.empty()) x.refuse("E11010", "CANN takes no Transpose without `perm`");
    x.last("Transpose", {{"x", x[0]}, {"perm", x.constant(order)}});
}

void join(Translation& x) {
    if (!x.has("axis")) x.refuse("E11010", "A Concat needs `axis`");
    const int64_t axis = x.integer("axis", 0), count = static_cast<int64_t>(x.inputs());
    if (count == 1) return x.last("Identity", {{"x", x[0]}});
    std::vector<Input> inputs;
    for (size_t i = 0; i < x.inputs(); ++i) inputs.push_back({"x", x[i]});
    x.last("ConcatD", inputs, {{"concat_dim", axis}, {"N", count}});
}

// Into equal parts, or into those of an attribute or, in later opsets, of an input.
void split(Translation& x) {
    const int64_t count = static_cast<int64_t>(x.outputs());
    const Source axis = x.constant(at::scalar_tensor(x.integer("axis", 0), at::kInt));
    const Ints sizes = x.list("split");
    if (x.integer("num_outputs", count) != count) x.refuse("E11010", "`num_outputs` is not the number of outputs");
    const Attributes attributes{{"num_split", count}};
    if (!x.has(1) && sizes.empty()) return x.last("Split", {{"split_dim", axis}, {"x", x[0]}}, attributes);
    const Source parts = x.has(1) ? x[1] : x.constant(sizes);
    x.last("SplitV", {{"x", x[0]}, {"size_splits", parts}, {"split_dim", axis}}, attributes);
}

void slice(Translation& x) {
    x.last("StridedSliceV2", {{"x", x[0]}, {"begin", x[1]}, {"end", x[2]}, {"axes", x.optional(3)},
                              {"strides", x.optional(4)}});
}

void slice_of_attributes(Translation& x) {
    const Ints axes = x.list("axes");
    x.last("StridedSliceV2", {{"x", x[0]}, {"begin", x.constant(x.list("starts"))},
                              {"end", x.constant(x.list("ends"))},
                              {"axes", axes.empty() ? Source() : x.constant(axes)}, {"strides", {}}});
}

void gather_slices(Translation& x) {
    const int64_t batch = x.integer("batch_dims", 0);
    if (batch != 0) x.refuse("E11010", "CANN takes no other batch_dims than 0");
    x.last("GatherNd", {{"x", x[0]}, {"indices", x[1]}}, {{"batch_dims", batch}});
}

void gather(Translation& x) {
    const Source axis = x.constant(at::scalar_tensor(x.integer("axis", 0), at::kInt));
    x.last("GatherV2", {{"x", x[0]}, {"indices", x[1]}, {"axis", axis}}, {{"negative_index_support", int64_t{1}}});
}

void scatter(Translation& x) {
    x.last("ScatterElements", {{"data", x[0]}, {"indices", x[1]}, {"updates", x[2]}},
           {{"axis", x.integer("axis", 0)}, {"reduction", x.text("reduction", "none")}});
}

void scatter_slices(Translation& x) {
    const std::string reduction = x.text("reduction", "none");
    if (reduction != "none") x.refuse("a scatter that reduces by " + reduction + " is not emulated");
    x.last("ScatterNdUpdate", {{"var", x.add("TensorMove", {{"x", x[0]}})}, {"indices", x[1]}, {"updates", x[2]}});
}

// The value is one element; a shape without dimensions takes it as it is.
void fill(Translation& x) {
    const at::Tensor value = x.tensor("value", at::zeros({1}, at::kFloat));
    x.last("Fill", {{"dims", x[0]}, {"value", x.constant(value.reshape({}))}});
}

void pad(Translation& x) {
    if (x.has(3)) x.refuse("E19999", "CANN takes no Pad of some axes");
    x.last("PadV3", {{"x", x[0]}, {"paddings", x[1]}, {"constant_values", x.optional(2)}},
           {{"mode", x.text("mode", "constant")}, {"paddings_contiguous", int64_t{0}}});
}

void pad_of_attributes(Translation& x) {
    const Source value = x.constant(at::scalar_tensor(x.real("value", 0), at::kFloat));
    x.last("PadV3", {{"x", x[0]}, {"paddings", x.constant(x.list("pads"))}, {"constant_values", value}},
           {{"mode", x.text("mode", "constant")}, {"paddings_contiguous", int64_t{0}}});
}

void triangle(Translation& x) {
    x.last("Trilu", {{"x", x[0]}, {"k", x.optional(1)}}, {{"upper", x.integer("upper", 1)}});
}

void tile(Translation& x) { x.last("Tile", {{"x", x[0]}, {"multiples", x[1]}}); }

}  // namespace
}  // namespace cann::offline

ONNX(Shape, 8, 18, shape(x))
ONNX(Size, 8, 18, x.last("Size", {{"x", x[0]}}, {{"dtype", int64_t{ACL_INT64}}}))
ONNX(Reshape, 8, 18, x.last("Reshape", {{"x", x[0]}, {"shape", x[1]}}, {{"allowzero", x.integer("allowzero", 0)}}))
ONNX(Flatten, 8, 18, x.last("Flatten", {{"x", x[0]}}, {{"axis", x.integer("axis", 1)}}))
ONNX(Squeeze, 8, 12, x.last("Squeeze", {{"x", x[0]}}, {{"axis", x.list("axes")}}))
ONNX(Squeeze, 13, 18, x.last("SqueezeV3", {{"x", x[0]}, {"axes", x.optional(1)}}))
ONNX(Unsqueeze, 8, 12, x.last("Unsqueeze", {{"x", x[0]}}, {{"axes", x.list("axes")}}))
ONNX(Unsqueeze, 13, 18, x.last("UnsqueezeV3", {{"x", x[0]}, {"axes", x[1]}}))
ONNX(Expand, 8, 18, x.last("Expand", {{"x", x[0]}, {"shape", x[1]}}))
ONNX(Tile, 8, 18, tile(x))
ONNX(Transpose, 8, 18, transpose(x))
ONNX(Concat, 8, 18, join(x))
ONNX(Split, 8, 18, split(x))
ONNX(Slice, 8, 9, slice_of_attributes(x))
ONNX(Slice, 10, 18, slice(x))
ONNX(Gather, 8, 18, gather(x))
ONNX(GatherND, 8, 18, gather_slices(x))
ONNX(GatherElements, 8, 18, x.last("GatherElements", {{"x", x[0]}, {"index", x[1]}}, {{"dim", x.integer("axis", 0)}}))
ONNX(ScatterElements, 11, 18, scatter(x))
ONNX(ScatterND, 8, 18, scatter_slices(x))
ONNX(Pad, 8, 10, pad_of_attributes(x))
ONNX(Pad, 11, 18, pad(x))
ONNX(Trilu, 14, 18, triangle(x))
ONNX(Range, 8, 18, x.last("Range", {{"start", x[0]}, {"limit", x[1]}, {"delta", x[2]}}))
ONNX(ConstantOfShape, 8, 18, fill(x))
