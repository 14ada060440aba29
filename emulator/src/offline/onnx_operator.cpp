#include "offline/onnx_operator.h"

namespace cann::offline {
namespace {

std::multimap<std::string, OnnxOperator>& table() {
    static std::multimap<std::string, OnnxOperator> instance;
    return instance;
}

}  // namespace

OnnxRegistration::OnnxRegistration(const char* type, int64_t first_opset, int64_t last_opset,
                                   std::function<void(Translation&)> translate) {
    table().emplace(type, OnnxOperator{first_opset, last_opset, std::move(translate)});
}

const OnnxOperator& find_onnx_operator(const std::string& domain, int64_t opset, const std::string& type) {
    if (domain == "ai.onnx") {
        const auto [first, last] = table().equal_range(type);
        for (auto found = first; found != last; ++found) {
            if (found->second.first_opset <= opset && opset <= found->second.last_opset) return found->second;
        }
    }
    throw Refusal("E16002", "No ONNX parser is registered for optype " + domain + "::" + std::to_string(opset) +
                                "::" + type + ".");
}

Source Translation::optional(size_t input) const {
    if (!has(input)) return {};
    const auto source = values_.sources.find(node_.inputs[input]);
    if (source == values_.sources.end()) refuse("E19999", "Nothing before it makes its input " + node_.inputs[input]);
    return source->second;
}

Source Translation::operator[](size_t input) const {
    if (!has(input)) refuse("E19999", "Its input " + std::to_string(input) + " is missing");
    return optional(input);
}

std::optional<at::Tensor> Translation::known(size_t input) const {
    const auto value = has(input) ? values_.known.find(node_.inputs[input]) : values_.known.end();
    return value == values_.known.end() ? std::nullopt : std::optional(value->second);
}

template <class T>
T Translation::either(const char* name, T otherwise) const {
    read_.insert(name);
    const auto found = node_.attributes.find(name);
    if (found == node_.attributes.end()) return otherwise;
    const T* value = std::get_if<T>(&found->second);
    if (value == nullptr) refuse("E19999", std::string("Its attribute ") + name + " has an unexpected type");
    return *value;
}

template int64_t Translation::either(const char*, int64_t) const;
template double Translation::either(const char*, double) const;
template std::string Translation::either(const char*, std::string) const;
template Ints Translation::either(const char*, Ints) const;
template at::Tensor Translation::either(const char*, at::Tensor) const;

std::string Translation::unique_name(const char* type) {
    return node_.name + "_" + type + "_" + std::to_string(added_++);
}

namespace {

graph::Node made_node(const std::string& name, const char* type, const std::vector<Input>& inputs, size_t outputs) {
    graph::Node node;
    node.name = name;
    node.type = type;
    for (const Input& input : inputs) {
        node.inputs.push_back(input.source);
        node.input_descs.emplace_back();
        node.input_descs.back().name = input.name;
        node.input_descs.back().absent = input.source.node.empty();
    }
    node.output_descs.resize(outputs);
    if (outputs > 0) node.output_descs[0].name = "y";  // as rules and the trace know the result of a product
    return node;
}

}  // namespace

Source Translation::add(const char* type, const std::vector<Input>& inputs, Attributes attributes, size_t outputs) {
    nodes_.push_back(made_node(unique_name(type), type, inputs, outputs));
    nodes_.back().attributes = std::move(attributes);
    return {nodes_.back().name, 0};
}

Source Translation::constant(const at::Tensor& value) { return add("Const", {}, {{"value", value}}); }

void Translation::last(const char* type, const std::vector<Input>& inputs, Attributes attributes) {
    nodes_.push_back(made_node(node_.name, type, inputs, node_.outputs.size()));
    nodes_.back().attributes = std::move(attributes);
    for (size_t i = 0; i < node_.outputs.size(); ++i) {
        values_.sources[node_.outputs[i]] = {node_.name, static_cast<int>(i)};
    }
}

void Translation::give(const std::vector<Source>& sources) {
    for (size_t i = 0; i < node_.outputs.size(); ++i) {
        if (node_.outputs[i].empty()) continue;
        if (i >= sources.size()) refuse("its output " + node_.outputs[i] + " is not emulated");
        values_.sources[node_.outputs[i]] = sources[i];
    }
}

std::string Translation::where() const {
    return " (ONNX node " + node_.name + ", " + node_.domain + "::" + std::to_string(opset) + "::" + node_.type + ")";
}

void Translation::refuse(const char* code, const std::string& reason) const {
    throw Refusal(code, reason + where() + ".");
}

void Translation::refuse(const std::string& reason) const { throw unsupported(reason + where()); }

void Translation::check_attributes() const {
    for (const auto& [name, value] : node_.attributes) {
        if (read_.count(name) == 0) refuse("its attribute " + name + " is not emulated");
    }
}

}  // namespace cann::offline
