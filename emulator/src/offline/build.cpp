#include "offline/build.h"

#include <algorithm>
#include <set>

#include "offline/aipp.h"
#include "offline/onnx.h"
#include "offline/text.h"
#include "ops/tensor.h"
#include "runtime/runtime.h"

namespace cann::offline {
namespace {

using graph::Graph;
using graph::Node;

[[noreturn]] void refuse(const std::string& option, const std::string& value, const std::string& reason) {
    throw Refusal("E10001", "Value " + value + " for parameter --" + option + " is invalid. Reason: " + reason);
}

[[noreturn]] void not_found(const std::string& option, const std::string& name) {
    throw Refusal("E10016", "Op name " + name + " specified in --" + option + " is not found in the model. Confirm whether "
                  "this node name exists, or whether the node is not split with the specified delimiter ';'.");
}

void check_format(const std::string& format, bool has_aipp) {
    static const std::set<std::string> formats{"", "NCHW", "ND", "NCDHW"};
    if (formats.count(format) == 0) refuse("input_format", format, "The value must be NCHW, ND or NCDHW in ONNX model.");
    if (has_aipp && !format.empty() && format != "NCHW") {
        refuse("input_format", format, "AIPP needs NCHW.");
    }
}

at::ScalarType output_dtype(const std::string& name) {
    static const std::map<std::string, at::ScalarType> names{
        {"FP32", at::kFloat},  {"FP16", at::kHalf},   {"UINT8", at::kByte},   {"INT8", at::kChar},
        {"UINT16", at::kUInt16}, {"INT16", at::kShort}, {"UINT32", at::kUInt32}, {"INT32", at::kInt},
        {"UINT64", at::kUInt64}, {"INT64", at::kLong},  {"DOUBLE", at::kDouble}};
    const auto found = names.find(name);
    if (found == names.end()) {
        refuse("output_type", name, "The current value is not within the valid range. Only support FP32, FP16, UINT8, INT8, "
               "UINT16, INT16, UINT32, INT32, UINT64, INT64, DOUBLE.");
    }
    return found->second;
}

// Of "node:index:output" (the file's way to call it) what --out_nodes may say: "node:index", or "output".
bool is_called(const std::string& port, const std::string& name) {
    return port.starts_with(name + ":") || port.ends_with(":" + name) || port == name;
}

// --out_nodes: those outputs, in that order.
void choose_outputs(Graph& graph, const std::string& out_nodes) {
    if (out_nodes.empty()) return;
    Node& last = net_output(graph);
    const Node all = last;
    last.inputs.clear();
    last.input_descs.clear();
    for (const std::string& name : split(out_nodes, ';')) {
        size_t i = 0;
        while (i < all.inputs.size() && !is_called(all.input_descs[i].name, name)) ++i;
        if (i == all.inputs.size()) {
            const std::string node = name.substr(0, name.rfind(':'));
            for (const Node& other : graph.nodes) {
                if (other.name != node) continue;
                throw Refusal("E10055", "The operation is not supported. Reason: the emulator takes only outputs of the "
                              "model in --out_nodes, and " + name + " is within it.");
            }
            not_found("out_nodes", name);
        }
        last.inputs.push_back(all.inputs[i]);
        last.input_descs.push_back(all.input_descs[i]);
    }
}

// --output_type: of all outputs, or "node:index:type" of some.
void set_output_types(Graph& graph, const BuildOptions& options) {
    if (options.output_type.empty()) return;
    const bool is_for_all = options.output_type.find(':') == std::string::npos;
    if (!is_for_all && options.out_nodes.empty()) {
        refuse("output_type", options.output_type, "output_type must be the type of all outputs when out_nodes is not set.");
    }
    Node& last = net_output(graph);
    std::vector<Node> casts;
    for (const std::string& part : split(options.output_type, ';')) {
        const std::string output = is_for_all ? "" : part.substr(0, part.rfind(':'));
        const at::ScalarType dtype = output_dtype(is_for_all ? part : part.substr(part.rfind(':') + 1));
        bool found = is_for_all;
        for (size_t i = 0; i < last.inputs.size(); ++i) {
            if (!is_for_all && !is_called(last.input_descs[i].name, output)) continue;
            casts.push_back(make_cast("output_" + std::to_string(i) + "_type", last.inputs[i], dtype));
            last.inputs[i] = {casts.back().name, 0};
            last.input_descs[i].dtype = dtype;
            found = true;
        }
        if (!found) not_found("output_type", part);
    }
    graph.nodes.insert(graph.nodes.end(), casts.begin(), casts.end());
}

// --input_fp16_nodes: those are fed in float16.
void set_half_inputs(Graph& graph, const std::string& names) {
    for (const std::string& name : split(names, ';')) {
        const auto found = std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) { return n.name == name; });
        if (found == graph.nodes.end()) not_found("input_fp16_nodes", name);
        if (found->type != "Data") {
            throw Refusal("E10017", "Input Op " + name + " specified in --input_fp16_nodes is invalid. The Op type must be Data.");
        }
        auto& dtype = found->output_descs.at(0).dtype;
        if (dtype == at::kByte) throw Refusal("E10034", "Nodes (for example, " + name + ") connected to AIPP must not be of type FP16.");
        const Node cast = make_cast(name + "_fp16_cast", {name, 0}, dtype.value());
        dtype = at::kHalf;
        redirect(graph, name, cast.name);
        graph.nodes.push_back(cast);
    }
}

std::string name_of(const std::string& model, const Ints& gear) {
    if (gear.empty()) return model;
    std::string text = model + "[";
    for (size_t i = 0; i < gear.size(); ++i) text += (i == 0 ? "" : ",") + std::to_string(gear[i]);
    return text + "]";
}

// Gears fill in the -1 of --input_shape in its order; here they come in the order of the model's inputs.
std::vector<Ints> in_model_order(const Graph& graph, const Shapes& shapes) {
    if (shapes.dynamic != Dynamic::kDims) return shapes.gears;
    std::map<std::string, std::pair<size_t, size_t>> places;  // where an input's part of a gear begins, and its length
    size_t next = 0;
    for (const auto& [name, sizes] : shapes.given) {
        const size_t count = std::count(sizes.begin(), sizes.end(), -1);
        places[name] = {next, count};
        next += count;
    }
    std::vector<Ints> gears;
    for (const Ints& gear : shapes.gears) {
        Ints& ordered = gears.emplace_back();
        for (const Node& node : graph.nodes) {
            const auto place = places.find(node.name);
            if (node.type != "Data" || place == places.end()) continue;
            const auto [begin, count] = place->second;
            ordered.insert(ordered.end(), gear.begin() + begin, gear.begin() + begin + count);
        }
    }
    return gears;
}

Profile compile_profile(Graph graph, const std::string& name, const std::vector<Ints>& inputs, const Ints& gear) {
    graph.name = name_of(name, gear);
    size_t next = 0;
    for (Node& node : graph.nodes) {
        if (node.type == "Data") node.output_descs[0].sizes = inputs[next++];
    }
    Profile profile{gear, inputs, {}, {}};
    try {
        profile.compiled = graph::compile(std::make_shared<Graph>(std::move(graph)));
    } catch (const std::exception& error) {
        throw Refusal("E19999", error.what());
    }
    for (int output : profile.compiled.outputs) profile.outputs.push_back(profile.compiled.values[output].sizes);
    return profile;
}

std::vector<Port> input_ports(const Graph& graph, const std::vector<Ints>& sizes, const std::vector<Aipp>& pictures) {
    std::vector<Port> ports;
    for (const Node& node : graph.nodes) {
        if (node.type != "Data") continue;
        const graph::Declared& desc = node.output_descs.at(0);
        if (!desc.dtype) throw Refusal("E19999", "the data type of the input " + node.name + " is not emulated");
        ports.push_back({node.name, *desc.dtype, sizes[ports.size()], desc.format, ""});
    }
    for (const Aipp& picture : pictures) {
        ports[picture.input].image = picture.image;
        ports[picture.input].format = ACL_FORMAT_NHWC;
    }
    return ports;
}

// The sizes of an output that all profiles share; -1 where they differ.
Ints common_sizes(const std::vector<Profile>& profiles, size_t output) {
    Ints sizes = profiles[0].outputs[output];
    for (const Profile& profile : profiles) {
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (profile.outputs[output].size() != sizes.size() || profile.outputs[output][i] != sizes[i]) sizes[i] = -1;
        }
    }
    return sizes;
}

std::vector<Port> output_ports(Graph& graph, const std::vector<Profile>& profiles) {
    const graph::Compiled& compiled = profiles[0].compiled;
    std::vector<Port> ports;
    for (const graph::Declared& desc : net_output(graph).input_descs) {
        const size_t i = ports.size();
        const at::ScalarType dtype = compiled.values[compiled.outputs.at(i)].dtype;
        ports.push_back({desc.name, dtype, common_sizes(profiles, i), desc.format, ""});
    }
    return ports;
}

size_t largest_of(const OfflineModel& model) {
    const auto bytes = [&](const Profile& profile) {
        size_t sum = 0;
        for (size_t i = 0; i < model.inputs.size(); ++i) sum += bytes_of(profile.inputs[i], model.inputs[i].dtype);
        return sum;
    };
    size_t largest = 0;
    for (size_t i = 1; i < model.profiles.size(); ++i) {
        if (bytes(model.profiles[i]) > bytes(model.profiles[largest])) largest = i;
    }
    return largest;
}

}  // namespace

void check(const BuildOptions& options) {
    if (options.soc_version != chip().soc) {
        refuse("soc_version", options.soc_version, "The operator package of this chip is not installed; the emulated machine "
               "has that of " + chip().soc + ".");
    }
    precision_of(options.precision_mode, options.precision_mode_v2);
    parse_shapes(options.shapes);
    if (!options.insert_op_conf.empty() && !options.shapes.dynamic_dims.empty()) {
        refuse("insert_op_conf", options.insert_op_conf, "The dynamic dims function does not support AIPP.");
    }
    check_format(options.shapes.input_format, !options.insert_op_conf.empty());
    if (!options.insert_op_conf.empty()) parse_aipp(options.insert_op_conf);
    if (!options.output_type.empty() && options.output_type.find(':') == std::string::npos) output_dtype(options.output_type);
}

OfflineModel build(Graph graph, const std::string& name, const BuildOptions& options) {
    check(options);
    const Shapes shapes = parse_shapes(options.shapes);
    std::vector<Ints> sizes = input_sizes(graph, shapes);
    std::vector<Ints> gears = in_model_order(graph, shapes);
    if (gears.empty()) gears.emplace_back();
    std::vector<Aipp> pictures;
    if (!options.insert_op_conf.empty()) pictures = parse_aipp(options.insert_op_conf);
    choose_outputs(graph, options.out_nodes);
    insert_aipp(graph, pictures, sizes);
    set_half_inputs(graph, options.input_fp16_nodes);
    set_output_types(graph, options);
    set_precision(graph, precision_of(options.precision_mode, options.precision_mode_v2));
    OfflineModel model;
    model.name = name;
    model.soc = chip().soc;
    model.version = chip().version;
    const std::string& mode = options.precision_mode_v2.empty() ? options.precision_mode : options.precision_mode_v2;
    model.precision = mode.empty() ? "force_fp16" : mode;
    model.command_line = options.command_line;
    model.dynamic = shapes.dynamic;
    for (const Ints& gear : gears) {
        model.profiles.push_back(compile_profile(graph, name, fill(sizes, shapes.dynamic, gear), gear));
    }
    model.inputs = input_ports(graph, sizes, pictures);
    model.outputs = output_ports(graph, model.profiles);
    model.largest = largest_of(model);
    return model;
}

}  // namespace cann::offline
