// GE's graphs as torchair loads and inspects them, and what it asks about operators.
#include <fstream>

#include "graph/ge_api.h"
#include "graph/operation.h"
#include "runtime/runtime.h"

namespace ge {

Graph::Graph(const char* name) : content(std::make_shared<cann::graph::Graph>(cann::graph::Graph{name, {}})) {}

Status Graph::LoadFromSerializedModelArray(const void* bytes, size_t size) {
    try {
        const std::string_view serialized(static_cast<const char*>(bytes), size);
        content = std::make_shared<cann::graph::Graph>(cann::graph::parse_model(serialized));
        return SUCCESS;
    } catch (const std::exception& error) {
        cann::fail(ACL_ERROR_INVALID_PARAM, "the graph cannot be read: %s", error.what());
        return FAILED;
    }
}

Status Graph::CopyFrom(const Graph& other) {
    content = other.content;
    return SUCCESS;
}

Status Graph::SaveToFile(const char*) const {
    cann::fail(ACL_ERROR_FEATURE_UNSUPPORTED, "graphs are not written to files: export is not emulated");
    return FAILED;
}

std::vector<GNode> Graph::GetAllNodes() const {
    std::vector<GNode> nodes;
    for (const cann::graph::Node& node : content->nodes) nodes.push_back({std::make_shared<std::string>(node.type)});
    return nodes;
}

Status GNode::GetType(AscendString& type_) const {
    type_ = AscendString(type->c_str());
    return SUCCESS;
}

bool OperatorFactory::IsExistOp(const char* type) { return cann::graph::find_operation(type) != nullptr; }

Operator OperatorFactory::CreateOperator(const char*, const char* type) {
    Operator created;
    created.type = std::make_shared<std::string>(type);
    return created;
}

// torchair asks whether optional inputs and attributes exist in this release of CANN. They do; those that the emulator
// lacks are refused when a graph that uses them is compiled.
Status Operator::UpdateInputDesc(const char*, const TensorDesc&) { return SUCCESS; }
Status Operator::GetAllIrAttrNamesAndTypes(Options& names_and_types) const {
    for (const char* name : {"activate_left", "alpha", "approximate", "axis", "data_format", "dim", "enable_hf32",
                             "eps", "is_training", "keep_original_dtype", "layout", "mode", "perm_x1", "perm_x2",
                             "perm_y", "rotary_mode", "type"}) {
        names_and_types.emplace(name, "");
    }
    return SUCCESS;
}

}  // namespace ge

// torchair looks this function up by name before it builds a node that it has no class for. Only whether the operator
// exists is answered: which inputs and attributes it has is not declared anywhere.
using NamesAndKinds = std::vector<std::pair<ge::AscendString, ge::AscendString>>;
extern "C" __attribute__((visibility("default"))) ge::Status GetRegisteredIrDef(const char* type, NamesAndKinds&,
                                                                              NamesAndKinds&, NamesAndKinds&) {
    return cann::graph::find_operation(type) ? ge::SUCCESS : ge::FAILED;
}
