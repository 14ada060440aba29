#include "offline/precision.h"

#include <algorithm>
#include <map>
#include <set>

#include "offline/onnx.h"
#include "ops/tensor.h"
#include "runtime/runtime.h"

namespace cann::offline {
namespace {

using graph::Graph;
using graph::Node;

const std::map<std::string, Precision>& modes() {
    static const std::map<std::string, Precision> names{
        {"force_fp16", Precision::kHalf},
        {"force_fp32", Precision::kCubeInHalf},
        {"cube_fp16in_fp32out", Precision::kCubeInHalf},
        {"allow_fp32_to_fp16", Precision::kMatrixHalf},
        {"must_keep_origin_dtype", Precision::kOrigin},
        {"allow_mix_precision", Precision::kMatrixHalf},
        {"allow_mix_precision_fp16", Precision::kMatrixHalf},
        {"allow_mix_precision_bf16", Precision::kMatrixBfloat},
        {"allow_fp32_to_bf16", Precision::kOrigin},  // float32 stays where an operator has it, and all here have
    };
    return names;
}

const std::map<std::string, Precision>& modes_v2() {
    static const std::map<std::string, Precision> names{
        {"fp16", Precision::kHalf},
        {"origin", Precision::kOrigin},
        {"cube_fp16in_fp32out", Precision::kCubeInHalf},
        {"mixed_float16", Precision::kMatrixHalf},
        {"mixed_bfloat16", Precision::kMatrixBfloat},
    };
    return names;
}

Precision find(const std::map<std::string, Precision>& names, const char* option, const std::string& mode) {
    const bool bfloat = mode.find("bf16") != std::string::npos || mode.find("bfloat16") != std::string::npos;
    const auto found = names.find(mode);
    std::string reason;
    if (found == names.end()) {
        reason = "The value must be one of:";
        for (const auto& [name, precision] : names) reason += " " + name;
    } else if (bfloat && !chip().inf_nan) {  // both came with the 910B generation
        reason = chip().soc + " does not support bfloat16";
    }
    if (reason.empty()) return found->second;
    throw Refusal("E10001", "Value " + mode + " for parameter " + option + " is invalid. Reason: " + reason + ".");
}

bool is_float(std::optional<at::ScalarType> dtype) {
    return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
}

bool is_product(const Node& node) {
    static const std::set<std::string> types{"MatMul",        "MatMulV2", "MatMulV3", "BatchMatMul",          "BatchMatMulV2",
                                             "BatchMatMulV3", "Conv2D",   "Conv3D",   "Conv2DTransposeD", "Conv2DTranspose"};
    return types.count(node.type) != 0;
}

// --is_weight_clip is on by default: what float16 cannot hold becomes its largest value.
at::Tensor converted(const at::Tensor& constant, at::ScalarType dtype) {
    if (dtype != at::kHalf || constant.scalar_type() == at::kHalf) return constant.to(dtype);
    constexpr double kLargest = 65504;
    return constant.clamp(-kLargest, kLargest).to(at::kHalf);
}

// Everything in floating point becomes `dtype`.
void convert_all(Graph& graph, at::ScalarType dtype) {
    std::vector<Node> added;
    for (Node& node : graph.nodes) {
        if (node.type == "Const" || node.type == "Constant") {
            at::Tensor& value = std::get<at::Tensor>(node.attributes.at("value"));
            if (is_float(value.scalar_type())) value = converted(value, dtype);
        }
        for (const char* name : {"dst_type", "dtype"}) {
            const auto found = node.attributes.find(name);
            if (node.type == "Data" || found == node.attributes.end()) continue;
            int64_t& type = std::get<int64_t>(found->second);
            if (type == ACL_FLOAT || type == ACL_FLOAT16 || type == ACL_BF16) type = to_acl(dtype);
        }
        if (node.type == "Data" && is_float(node.output_descs.at(0).dtype) && node.output_descs[0].dtype != dtype) {
            added.push_back(make_cast(node.name + "_cast", {node.name, 0}, dtype));
        }
    }
    for (const Node& cast : added) redirect(graph, cast.inputs[0].node, cast.name);
    graph.nodes.insert(graph.nodes.end(), added.begin(), added.end());
}

// The operands of products are rounded to `dtype`, and then computed with in `unit`; the results are float32 again.
void convert_products(Graph& graph, at::ScalarType dtype, at::ScalarType unit) {
    std::vector<Node> added;
    const auto insert = [&](const std::string& name, graph::Source& source, at::ScalarType to) {
        added.push_back(make_cast(name, source, to));
        source = {name, 0};
    };
    std::vector<std::string> products;
    for (Node& node : graph.nodes) {
        if (!is_product(node)) continue;
        for (size_t i = 0; i < node.inputs.size(); ++i) {
            if (node.inputs[i].node.empty()) continue;
            const std::string name = node.name + "_cast_" + std::to_string(i);
            insert(name, node.inputs[i], dtype);
            if (unit != dtype) insert(name + "_back", node.inputs[i], unit);
        }
        if (unit != at::kFloat) products.push_back(node.name);
    }
    for (const std::string& name : products) {
        redirect(graph, name, name + "_cast");
        added.push_back(make_cast(name + "_cast", {name, 0}, at::kFloat));
    }
    graph.nodes.insert(graph.nodes.end(), added.begin(), added.end());
}

// The program gets the model's dtypes, whatever was computed in; a conversion to the dtype that is there costs nothing.
void convert_outputs(Graph& graph) {
    std::vector<Node> added;
    Node& last = net_output(graph);
    for (size_t i = 0; i < last.inputs.size(); ++i) {
        const auto dtype = last.input_descs.at(i).dtype;
        if (!is_float(dtype)) continue;
        added.push_back(make_cast("output_" + std::to_string(i) + "_cast", last.inputs[i], *dtype));
        last.inputs[i] = {added.back().name, 0};
    }
    graph.nodes.insert(graph.nodes.end(), added.begin(), added.end());
}

// Which results of products would have to become float32 again is not known where the model has 16-bit ones itself.
void require_float32(const Graph& graph) {
    for (const Node& node : graph.nodes) {
        std::optional<at::ScalarType> dtype;
        if (node.type == "Data") dtype = node.output_descs.at(0).dtype;
        if (node.type == "Const") dtype = std::get<at::Tensor>(node.attributes.at("value")).scalar_type();
        if (dtype != at::kHalf && dtype != at::kBFloat16) continue;
        throw Refusal("E10055", "The operation is not supported. Reason: the emulator has modes that lower the precision of "
                      "products only for models in float32, and " + node.name + " is in " + dtype_name(*dtype) + ".");
    }
}

}  // namespace

Precision precision_of(const std::string& mode, const std::string& mode_v2) {
    if (!mode.empty() && !mode_v2.empty()) {
        throw Refusal("E10056", "Cannot configure both parameters --precision_mode and --precision_mode_v2 simultaneously.");
    }
    if (!mode.empty()) return find(modes(), "--precision_mode", mode);
    return mode_v2.empty() ? Precision::kHalf : find(modes_v2(), "--precision_mode_v2", mode_v2);
}

graph::Node& net_output(Graph& graph) {
    for (Node& node : graph.nodes) {
        if (node.type == "NetOutput") return node;
    }
    throw Refusal("E19999", "The graph has no outputs.");
}

graph::Node make_cast(const std::string& name, const graph::Source& source, at::ScalarType dtype) {
    Node cast;
    cast.name = name;
    cast.type = "Cast";
    cast.inputs = {source};
    cast.input_descs.emplace_back().name = "x";
    cast.output_descs.emplace_back().name = "y";
    cast.attributes["dst_type"] = static_cast<int64_t>(to_acl(dtype));
    return cast;
}

void redirect(Graph& graph, const std::string& from, const std::string& to) {
    for (Node& node : graph.nodes) {
        for (graph::Source& source : node.inputs) {
            if (source.node == from && source.index == 0) source.node = to;
        }
    }
}

void set_precision(Graph& graph, Precision precision) {
    switch (precision) {
        case Precision::kOrigin: return;
        case Precision::kHalf: convert_all(graph, at::kHalf); break;
        case Precision::kCubeInHalf:
            convert_all(graph, at::kFloat);
            convert_products(graph, at::kHalf, at::kFloat);
            break;
        case Precision::kMatrixHalf:
            require_float32(graph);
            convert_products(graph, at::kHalf, at::kHalf);
            break;
        case Precision::kMatrixBfloat:
            require_float32(graph);
            convert_products(graph, at::kBFloat16, at::kBFloat16);
            break;
    }
    convert_outputs(graph);
}

}  // namespace cann::offline
