// The layers of networks: matrix products, convolutions, normalisations, softmax, resizing.
#include "offline/onnx_operator.h"
#include "ops/tensor.h"

namespace cann::offline {
namespace {

void product(Translation& x) {
    x.last("BatchMatMulV2", {{"x1", x[0]}, {"x2", x[1]}}, {{"adj_x1", int64_t{0}}, {"adj_x2", int64_t{0}}});
}

Source scaled(Translation& x, const Source& source, double factor) {
    return factor == 1 ? source : x.add("Muls", {{"x", source}}, {{"value", factor}});
}

// alpha * a @ b + beta * c; without c, CANN's parser leaves alpha out.
void general_product(Translation& x) {
    const double alpha = x.real("alpha", 1), beta = x.real("beta", 1);
    const std::vector<Input> inputs{{"x1", x[0]}, {"x2", x[1]}};
    const Attributes attributes{{"transpose_x1", int64_t{x.integer("transA", 0) != 0}},
                                {"transpose_x2", int64_t{x.integer("transB", 0) != 0}}};
    if (!x.has(2)) {
        if (alpha != 1) x.refuse("CANN's parser reads a Gemm without C as one without `alpha`");
        return x.last("MatMulV2", inputs, attributes);
    }
    const Source made = scaled(x, x.add("MatMulV2", inputs, attributes), alpha);
    x.last("Add", {{"x1", made}, {"x2", scaled(x, x[2], beta)}});
}

// [begin..., end...] as pairs.
Ints as_pairs(const Ints& pads) {
    Ints pairs;
    for (size_t i = 0; i < pads.size() / 2; ++i) {
        pairs.push_back(pads[i]);
        pairs.push_back(pads[i + pads.size() / 2]);
    }
    return pairs;
}

Ints with_batch_and_channels(Ints values) {
    values.insert(values.begin(), {1, 1});
    return values;
}

// Of one dimension as of two, the first of which is 1.
void convolve(Translation& x) {
    const Ints kernel = x.list("kernel_shape"), given = x.list("strides");
    const size_t dims = !kernel.empty() ? kernel.size() : !given.empty() ? given.size() : 2;
    const Ints ones(dims, 1);
    Ints strides = x.list("strides", ones), dilations = x.list("dilations", ones);
    Ints pads = as_pairs(x.list("pads", Ints(2 * dims, 0)));
    const std::string padding = x.text("auto_pad", "NOTSET");
    if (padding != "NOTSET" && padding != "VALID") x.refuse("a Conv with auto_pad " + padding + " is not emulated");
    if (dims > 3) x.refuse("E11010", "CANN takes no Conv of more than three dimensions");
    Source source = x[0], filter = x[1];
    if (dims == 1) {
        for (Ints* values : {&strides, &dilations}) values->insert(values->begin(), 1);
        pads.insert(pads.begin(), {0, 0});
        source = x.add("Unsqueeze", {{"x", source}}, {{"axes", Ints{2}}});
        filter = x.add("Unsqueeze", {{"x", filter}}, {{"axes", Ints{2}}});
    }
    const std::vector<Input> inputs{{"x", source}, {"filter", filter}, {"bias", x.optional(2)}};
    const Attributes attributes{{"strides", with_batch_and_channels(strides)},
                                {"dilations", with_batch_and_channels(dilations)},
                                {"pads", pads},
                                {"groups", x.integer("group", 1)},
                                {"data_format", dims == 3 ? "NCDHW" : "NCHW"}};
    if (dims != 1) return x.last(dims == 3 ? "Conv3D" : "Conv2D", inputs, attributes);
    x.last("Squeeze", {{"x", x.add("Conv2D", inputs, attributes)}}, {{"axis", Ints{2}}});
}

void softmax(Translation& x, const char* type) {
    const int64_t axis = x.integer("axis", x.opset < 13 ? 1 : -1);
    Attributes attributes{{"axes", Ints{axis}}};
    if (x.opset < 13) attributes["need_fusion"] = int64_t{1};  // over all dimensions from that one on
    x.last(type, {{"x", x[0]}}, attributes);
}

// The second and the third output are the mean and 1 / deviation.
void layer_norm(Translation& x) {
    const double epsilon = x.real("epsilon", 1e-5);
    const bool wide = x.integer("stash_type", 1) != 0;
    const Source beta = x.has(2) ? x[2] : x.constant(at::zeros({}, at::kFloat));
    const Source normed = x.add("LayerNorm", {{"x", x[0]}, {"gamma", x[1]}, {"beta", beta}},
                                {{"begin_norm_axis", x.integer("axis", -1)}, {"epsilon", epsilon}}, 3);
    if (x.outputs() == 1) return x.give({normed});
    const Source mean{normed.node, 1}, variance{normed.node, 2};
    const Source shifted = x.add("Adds", {{"x", variance}}, {{"value", epsilon}});
    const Source inverse = x.add("Rsqrt", {{"x", shifted}});
    const auto stashed = [&](const Source& source) {
        return wide ? x.add("Cast", {{"x", source}}, {{"dst_type", int64_t{ACL_FLOAT}}}) : source;
    };
    x.give({normed, stashed(mean), stashed(inverse)});
}

void instance_norm(Translation& x) {
    const Source made = x.add("InstanceNorm", {{"x", x[0]}, {"gamma", x[1]}, {"beta", x[2]}},
                              {{"epsilon", x.real("epsilon", 1e-5)}, {"data_format", "NCHW"}}, 3);
    x.give({made});
}

void batch_norm(Translation& x) {
    if (x.integer("training_mode", 0) != 0) x.refuse("a BatchNormalization that trains is not emulated");
    x.real("momentum", 0.9);
    const Source made = x.add("BatchNorm", {{"x", x[0]}, {"scale", x[1]}, {"offset", x[2]}, {"mean", x[3]},
                                            {"variance", x[4]}},
                              {{"epsilon", x.real("epsilon", 1e-5)}, {"data_format", "NCHW"},
                               {"is_training", int64_t{0}}}, 3);
    x.give({made});
}

// The last two of the sizes that the operands say. Factors are kept exact, whatever becomes of the model's float32.
Source resized_sizes(Translation& x, size_t factors_input, bool has_sizes) {
    const auto cast = [&](const Source& source, aclDataType dtype) {
        return x.add("Cast", {{"x", source}}, {{"dst_type", int64_t{dtype}}});
    };
    Source sizes;
    if (has_sizes) {
        sizes = cast(x[factors_input + 1], ACL_INT64);
    } else {
        const auto known = x.known(factors_input);
        const Source factors = known ? x.constant(known->to(at::kDouble)) : cast(x[factors_input], ACL_DOUBLE);
        const Source now = x.add("Shape", {{"x", x[0]}}, {{"dtype", int64_t{ACL_INT64}}});
        sizes = cast(x.add("Mul", {{"x1", cast(now, ACL_DOUBLE)}, {"x2", factors}}), ACL_INT64);
    }
    const Source two = x.constant(Ints{2});
    return x.add("Slice", {{"x", sizes}, {"offsets", two}, {"size", two}});
}

// CANN's parser does not read `nearest_mode`: the kernel refuses sizes for which that would matter.
void resize(Translation& x) {
    const std::string mode = x.text("mode", "nearest");
    if (mode != "nearest") x.refuse("a Resize by " + mode + " is not emulated");
    for (const char* name : {"antialias", "exclude_outside"}) {
        if (x.integer(name, 0) != 0) x.refuse(std::string("a Resize with ") + name + " is not emulated");
    }
    if (x.has("axes")) x.refuse("CANN's parser reads a Resize of some axes as one of all");
    if (x.text("keep_aspect_ratio_policy", "stretch") != "stretch") x.refuse("CANN's parser stretches in any Resize");
    x.real("cubic_coeff_a", -0.75);
    x.real("extrapolation_value", 0);
    const std::string coordinates = x.text("coordinate_transformation_mode", x.opset == 10 ? "asymmetric" : "half_pixel");
    const bool centers = coordinates == "half_pixel" || coordinates == "pytorch_half_pixel";
    const bool corners = coordinates == "align_corners";
    if (!centers && !corners && coordinates != "asymmetric") x.refuse("CANN reads " + coordinates + " as asymmetric");
    const char* const rounding = x.opset == 10 ? "floor" : "round_prefer_floor";
    const Source sizes = x.opset == 10 ? resized_sizes(x, 1, false) : resized_sizes(x, 2, x.has(3));
    x.last("ResizeNearestNeighborV2", {{"x", x[0]}, {"size", sizes}},
           {{"align_corners", int64_t{corners}}, {"half_pixel_centers", int64_t{centers}},
            {"_onnx_nearest_mode", x.text("nearest_mode", rounding)}});
}

}  // namespace
}  // namespace cann::offline

ONNX(MatMul, 8, 18, product(x))
ONNX(Gemm, 8, 18, general_product(x))
ONNX(Conv, 8, 18, convolve(x))
ONNX(Softmax, 8, 18, softmax(x, "SoftmaxV2"))
ONNX(LogSoftmax, 8, 18, softmax(x, "LogSoftmaxV2"))
ONNX(LayerNormalization, 17, 18, layer_norm(x))
ONNX(InstanceNormalization, 8, 18, instance_norm(x))
ONNX(BatchNormalization, 8, 18, batch_norm(x))
ONNX(Resize, 10, 18, resize(x))
