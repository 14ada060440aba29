#include "offline/onnx_model.h"

#include "graph/wire.h"

namespace cann::offline {
namespace {

using graph::Attribute;
using graph::Ints;
using graph::Message;

int64_t read_dimension(std::string_view bytes) {
    int64_t size = -1;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) size = message.integer();
    }
    return size;
}

void read_tensor_type(std::string_view bytes, OnnxValue& value) {
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) value.dtype = dtype_of_onnx(message.integer());
        if (message.field() != 2) continue;
        for (Message shape(message.bytes()); shape.read();) {
            if (shape.field() == 1) value.sizes.push_back(read_dimension(shape.bytes()));
        }
    }
}

OnnxValue read_value(std::string_view bytes) {
    OnnxValue value;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) value.name = message.text();
        if (message.field() != 2) continue;
        for (Message type(message.bytes()); type.read();) {
            if (type.field() == 1) read_tensor_type(type.bytes(), value);
        }
    }
    return value;
}

// What an attribute is whose value was not written, because it is the one that protobuf assumes.
Attribute assumed(int64_t type) {
    constexpr int64_t kFloat = 1, kInteger = 2, kString = 3, kFloats = 6, kStrings = 8;
    switch (type) {
        case kFloat: return 0.0;
        case kInteger: return int64_t{0};
        case kString: return std::string();
        case kFloats: return std::vector<double>();
        case kStrings: return std::vector<std::string>();
        default: return Ints();
    }
}

void read_attribute(std::string_view bytes, const std::string& directory, OnnxNode& node) {
    std::string name;
    std::optional<Attribute> value;
    int64_t type = 0;
    Ints integers;
    std::vector<double> reals;
    std::vector<std::string> texts;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: name = message.text(); break;
            case 2: value = static_cast<double>(message.real()); break;
            case 3: value = message.integer(); break;
            case 4: value = message.text(); break;
            case 5: value = read_tensor(message.bytes(), directory).value; break;
            case 7: message.append_to(reals); break;
            case 8: message.append_to(integers); break;
            case 9: texts.push_back(message.text()); break;
            case 20: type = message.integer(); break;
            default: break;
        }
    }
    if (!integers.empty()) value = integers;
    if (!reals.empty()) value = reals;
    if (!texts.empty()) value = texts;
    node.attributes[name] = value ? *value : assumed(type);
}

OnnxNode read_node(std::string_view bytes, const std::string& directory) {
    OnnxNode node;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: node.inputs.push_back(message.text()); break;
            case 2: node.outputs.push_back(message.text()); break;
            case 3: node.name = message.text(); break;
            case 4: node.type = message.text(); break;
            case 5: read_attribute(message.bytes(), directory, node); break;
            case 7: node.domain = message.text(); break;
            default: break;
        }
    }
    return node;
}

void read_graph(std::string_view bytes, const std::string& directory, OnnxModel& model) {
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: model.nodes.push_back(read_node(message.bytes(), directory)); break;
            case 2: model.name = message.text(); break;
            case 5: model.initializers.push_back(read_tensor(message.bytes(), directory)); break;
            case 11: model.inputs.push_back(read_value(message.bytes())); break;
            case 12: model.outputs.push_back(read_value(message.bytes())); break;
            case 15: throw unsupported("the model has sparse initializers, which are not emulated");
            default: break;
        }
    }
}

std::string domain_name(const std::string& domain) { return domain.empty() ? "ai.onnx" : domain; }

void read_opset(std::string_view bytes, OnnxModel& model) {
    std::string domain;
    int64_t version = 0;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) domain = message.text();
        if (message.field() == 2) version = message.integer();
    }
    model.opsets[domain_name(domain)] = version;
}

// Nodes without a name are numbered, each by how many of them came before.
void name_nodes(OnnxModel& model) {
    int64_t unnamed = 0;
    for (OnnxNode& node : model.nodes) {
        node.domain = domain_name(node.domain);
        if (node.name.empty()) node.name = node.type + "_" + std::to_string(unnamed++);
    }
}

}  // namespace

OnnxModel read_onnx(std::string_view serialized, const std::string& directory) {
    OnnxModel model;
    bool has_graph = false;
    try {
        for (Message message(serialized); message.read();) {
            if (message.field() == 8) read_opset(message.bytes(), model);
            if (message.field() != 7) continue;
            has_graph = true;
            read_graph(message.bytes(), directory, model);
        }
    } catch (const Refusal&) {
        throw;
    } catch (const std::exception& error) {
        throw Refusal("E10041", std::string("Failed to load the model: it is no ONNX model (") + error.what() + ").");
    }
    if (!has_graph) throw Refusal("E16004", "ONNX model has no graph.");
    name_nodes(model);
    return model;
}

}  // namespace cann::offline
