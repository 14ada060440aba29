// Sums, extremes, norms.
#include "offline/onnx_operator.h"
#include "ops/tensor.h"

namespace cann::offline {
namespace {

// Dimensions come as an attribute, or in later opsets as an input; none stand for all of them.
void reduce(Translation& x, const char* type) {
    const Source axes = x.has(1) ? x[1] : x.constant(x.list("axes"));
    x.last(type, {{"x", x[0]}, {"axes", axes}},
           {{"keep_dims", x.integer("keepdims", 1)}, {"noop_with_empty_axes", x.integer("noop_with_empty_axes", 0)}});
}

void euclidean_norm(Translation& x) {
    x.last("LpNormV2", {{"x", x[0]}},
           {{"axes", x.list("axes")}, {"keepdim", x.integer("keepdims", 1)}, {"p", 2.0}});
}

void extreme_position(Translation& x, const char* type) {
    const Source axis = x.constant(at::scalar_tensor(x.integer("axis", 0), at::kInt));
    const bool keep = x.integer("keepdims", 1) != 0;
    if (x.integer("select_last_index", 0) != 0) x.refuse("E11010", "CANN takes no other select_last_index than 0");
    const std::vector<Input> inputs{{"x", x[0]}, {"dimension", axis}};
    const Attributes attributes{{"dtype", int64_t{ACL_INT64}}};
    if (!keep) return x.last(type, inputs, attributes);
    x.last("ExpandDims", {{"x", x.add(type, inputs, attributes)}, {"axis", axis}});
}

void cumulate(Translation& x) {
    x.last("Cumsum", {{"x", x[0]}, {"axis", x[1]}},
           {{"exclusive", x.integer("exclusive", 0)}, {"reverse", x.integer("reverse", 0)}});
}

}  // namespace
}  // namespace cann::offline

ONNX(ReduceSum, 8, 18, reduce(x, "ReduceSum"))
ONNX(ReduceMean, 8, 18, reduce(x, "ReduceMean"))
ONNX(ReduceMax, 8, 18, reduce(x, "ReduceMax"))
ONNX(ReduceMin, 8, 18, reduce(x, "ReduceMin"))
ONNX(ReduceProd, 8, 18, reduce(x, "ReduceProd"))
ONNX(ReduceL2, 8, 17, euclidean_norm(x))
ONNX(ArgMax, 8, 18, extreme_position(x, "ArgMaxV2"))
ONNX(ArgMin, 8, 18, extreme_position(x, "ArgMin"))
ONNX(CumSum, 8, 18, cumulate(x))
