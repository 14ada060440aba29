// From a model of ONNX to a graph of GE: inputs, constants, nodes in their order, outputs.
#include "offline/onnx.h"

#include <unordered_set>

#include "offline/onnx_operator.h"

namespace cann::offline {
namespace {

graph::Node plain_node(const std::string& name, const char* type) {
    graph::Node node;
    node.name = name;
    node.type = type;
    return node;
}

class Parser {
public:
    explicit Parser(OnnxModel model) : model_(std::move(model)) {}

    graph::Graph run() {
        result_.name = model_.name;
        add_initializers();
        add_inputs();
        if (model_.outputs.empty()) throw Refusal("E16001", "The model has no output node.");
        for (const OnnxNode& node : model_.nodes) translate(node);
        add_outputs();
        check_names();
        return std::move(result_);
    }

private:
    void add_constant(const std::string& node_name, const std::string& output, at::Tensor value) {
        graph::Node node = plain_node(node_name, "Const");
        values_.sources[output] = {node.name, 0};
        values_.known[output] = value;
        node.attributes["value"] = std::move(value);
        node.output_descs.resize(1);
        result_.nodes.push_back(std::move(node));
    }

    void add_initializers() {
        for (OnnxInitializer& initializer : model_.initializers) {
            const std::string number = std::to_string(result_.nodes.size());
            add_constant(initializer.name + "_initializer_" + number, initializer.name, std::move(initializer.value));
        }
    }

    // An input with a value among the initializers is a constant.
    void add_inputs() {
        int64_t index = 0;
        for (const OnnxValue& input : model_.inputs) {
            if (values_.sources.count(input.name) != 0) continue;
            if (!input.dtype) throw unsupported("the input " + input.name + " is no tensor of a dtype that is emulated");
            graph::Node node = plain_node(input.name, "Data");
            node.attributes["index"] = index++;
            graph::Declared desc;
            desc.name = "y";
            desc.dtype = input.dtype;
            desc.sizes = input.sizes;
            node.output_descs = {desc};
            values_.sources[input.name] = {input.name, 0};
            result_.nodes.push_back(std::move(node));
        }
        if (index == 0) throw Refusal("E16001", "The model has no input node.");
    }

    void translate(const OnnxNode& node) {
        const auto opset = model_.opsets.find(node.domain);
        if (opset == model_.opsets.end()) {
            throw Refusal("E19999", "The opset of domain[" + node.domain + "] has no responding version.");
        }
        for (size_t i = 0; i < node.outputs.size(); ++i) names_[node.outputs[i]] = node.name + ":" + std::to_string(i);
        if (node.type == "Constant" && node.domain == "ai.onnx") return add_constant_node(node);
        const OnnxOperator& found = find_onnx_operator(node.domain, opset->second, node.type);
        Translation translation(node, opset->second, values_, result_.nodes);
        found.translate(translation);
        translation.check_attributes();
    }

    // Of any opset; but only this attribute is read.
    void add_constant_node(const OnnxNode& node) {
        const auto value = node.attributes.find("value");
        if (value == node.attributes.end() || node.attributes.size() != 1 || node.outputs.size() != 1) {
            throw unsupported("the node " + node.name + " (Constant) has other attributes than `value`, and CANN reads no "
                              "other: the constant would be empty");
        }
        add_constant(node.name, node.outputs[0], std::get<at::Tensor>(value->second));
    }

    void add_outputs() {
        graph::Node node = plain_node("Node_Output", "NetOutput");
        for (const OnnxValue& output : model_.outputs) {
            const auto source = values_.sources.find(output.name);
            if (source == values_.sources.end()) {
                throw Refusal("E19999", "[Get][Outputs] Cannot find output:" + output.name + " in graph.");
            }
            node.inputs.push_back(source->second);
            graph::Declared desc;
            const auto made = names_.find(output.name);
            desc.name = (made == names_.end() ? source->second.node + ":0" : made->second) + ":" + output.name;
            desc.dtype = output.dtype;
            desc.sizes = output.sizes;
            node.input_descs.push_back(std::move(desc));
        }
        result_.nodes.push_back(std::move(node));
    }

    void check_names() const {
        std::unordered_set<std::string> names;
        for (const graph::Node& node : result_.nodes) {
            if (names.insert(node.name).second) continue;
            throw Refusal("E13009", "Operator " + node.name + " already exists in the graph. Ensure that operator names "
                                    "are unique.");
        }
    }

    OnnxModel model_;
    graph::Graph result_;
    Translation::Values values_;
    std::map<std::string, std::string> names_;  // of what ONNX nodes make: "node:index"
};

}  // namespace

graph::Graph parse_onnx(std::string_view serialized, const std::string& directory) {
    return Parser(read_onnx(serialized, directory)).run();
}

}  // namespace cann::offline
