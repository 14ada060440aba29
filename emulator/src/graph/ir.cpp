#include "graph/ir.h"

#include <c10/util/Exception.h>


#include "graph/wire.h"

namespace cann::graph {
namespace {

// The messages number the types in an order of their own, other than aclDataType.
std::optional<at::ScalarType> dtype_of_message(int64_t number) {
    switch (number) {
        case 1: return at::kFloat;
        case 2: return at::kHalf;
        case 3: return at::kChar;
        case 4: return at::kByte;
        case 5: return at::kShort;
        case 6: return at::kUInt16;
        case 7: return at::kInt;
        case 8: return at::kLong;
        case 9: return at::kUInt32;
        case 10: return at::kUInt64;
        case 11: return at::kBool;
        case 12: return at::kDouble;
        case 16: return at::kComplexFloat;
        case 17: return at::kComplexDouble;
        case 27: return at::kBFloat16;
        case 32: return at::kComplexHalf;
        case 34: return at::kFloat8_e5m2;
        case 35: return at::kFloat8_e4m3fn;
        default: return std::nullopt;
    }
}

Attribute parse_attribute(std::string_view bytes);

std::pair<std::string, std::string_view> parse_entry(std::string_view bytes) {
    std::pair<std::string, std::string_view> entry;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) entry.first = message.text();
        if (message.field() == 2) entry.second = message.bytes();
    }
    return entry;
}

Declared parse_desc(std::string_view bytes) {
    Declared desc;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: desc.name = message.text(); break;
            case 2: desc.dtype = dtype_of_message(message.integer()); break;
            case 3:
                for (Message shape(message.bytes()); shape.read();) {
                    if (shape.field() == 1) shape.append_to(desc.sizes);
                }
                break;
            case 5: {
                const auto [name, value] = parse_entry(message.bytes());
                if (name == "_fx_tensor_name") desc.fx_name = std::get<std::string>(parse_attribute(value));
                if (name == "_meta") desc.described = true;
                if (name == "format_for_int") desc.format = std::get<int64_t>(parse_attribute(value));
                if (name == "origin_shape") desc.sizes = std::get<Ints>(parse_attribute(value));
                if (name == "_is_unfed_optional") desc.absent = true;
                break;
            }
            case 14: desc.on_host = message.text() == "CPU"; break;
            default: break;
        }
    }
    return desc;
}

at::Tensor parse_tensor(std::string_view bytes) {
    Declared desc;
    std::string_view data;
    for (Message message(bytes); message.read();) {
        if (message.field() == 1) desc = parse_desc(message.bytes());
        if (message.field() == 2) data = message.bytes();
    }
    TORCH_CHECK(desc.dtype.has_value(), "a constant has a data type that is not emulated");
    const at::Tensor tensor = at::empty(desc.sizes, *desc.dtype);
    TORCH_CHECK(data.size() == tensor.nbytes(), "a constant has ", data.size(), " bytes instead of ", tensor.nbytes());
    std::copy(data.begin(), data.end(), static_cast<char*>(tensor.data_ptr()));
    return tensor;
}

// An empty list says in its last field what it would hold; it is taken for one of integers otherwise.
Attribute parse_list(std::string_view bytes) {
    std::vector<std::string> texts;
    Ints integers;
    std::vector<double> reals;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 2:
            case 7: texts.push_back(message.text()); break;
            case 3:
            case 5:
            case 12: message.append_to(integers); break;
            case 4: message.append_to(reals); break;
            default: break;
        }
    }
    if (!texts.empty()) return texts;
    if (!reals.empty()) return reals;
    return integers;
}

std::vector<Ints> parse_list_of_lists(std::string_view bytes) {
    std::vector<Ints> lists;
    for (Message outer(bytes); outer.read();) {
        lists.emplace_back();
        for (Message inner(outer.bytes()); inner.read();) inner.append_to(lists.back());
    }
    return lists;
}

Attribute parse_attribute(std::string_view bytes) {
    Attribute attribute;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: attribute = parse_list(message.bytes()); break;
            case 2:
            case 7: attribute = message.text(); break;
            case 3:
            case 5:
            case 15: attribute = message.integer(); break;
            case 4: attribute = static_cast<double>(message.real()); break;
            case 12: attribute = parse_tensor(message.bytes()); break;
            case 14: attribute = parse_list_of_lists(message.bytes()); break;
            default: break;
        }
    }
    return attribute;
}

Source parse_source(const std::string& text) {
    const size_t colon = text.rfind(':');
    if (colon == std::string::npos) return {};
    return {text.substr(0, colon), std::stoi(text.substr(colon + 1))};
}

Node parse_node(std::string_view bytes) {
    Node node;
    for (Message message(bytes); message.read();) {
        switch (message.field()) {
            case 1: node.name = message.text(); break;
            case 2: node.type = message.text(); break;
            case 5: {
                const Source source = parse_source(message.text());
                (source.index < 0 ? node.after : node.inputs).push_back(source);
                break;
            }
            case 10: {
                const auto [name, value] = parse_entry(message.bytes());
                node.attributes[name] = parse_attribute(value);
                break;
            }
            case 33: node.input_descs.push_back(parse_desc(message.bytes())); break;
            case 34: node.output_descs.push_back(parse_desc(message.bytes())); break;
            default: break;
        }
    }
    return node;
}

}  // namespace

Graph parse_model(std::string_view serialized) {
    Graph graph;
    bool found = false;
    for (Message model(serialized); model.read();) {
        if (model.field() != 7 || found) continue;  // the first graph is the whole; others are branches and loops
        found = true;
        for (Message message(model.bytes()); message.read();) {
            if (message.field() == 1) graph.name = message.text();
            if (message.field() == 6) graph.nodes.push_back(parse_node(message.bytes()));
        }
    }
    TORCH_CHECK(found, "the model has no graph");
    return graph;
}

}  // namespace cann::graph
