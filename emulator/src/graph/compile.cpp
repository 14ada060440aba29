// From the graph that torchair built to the steps that run: order, dead nodes, shapes, constants.
#include <c10/util/Exception.h>
#include <c10/util/strides.h>

#include <unordered_map>
#include <unordered_set>

#include "graph/calls.h"
#include "graph/compiler.h"

namespace cann::graph {
namespace {

// What torchair notes on nodes and GE itself uses, and what changes how fast an operator is but not its result.
bool is_annotation(const std::string& attribute) {
    static const std::unordered_set<std::string> names{
        "enable_hf32", "impl_mode", "input_layout_info", "N", "op_impl_mode_enum", "output_layout_info", "precision_mode", "T",
        "update_node_from_fx_input_idx"};
    return attribute[0] == '_' || names.count(attribute) != 0;
}

int64_t integer(const Node& node, const char* name) { return std::get<int64_t>(node.attributes.at(name)); }
Ints integers(const Node& node, const char* name) { return std::get<Ints>(node.attributes.at(name)); }

class Compiler {
public:
    explicit Compiler(std::shared_ptr<const Graph> graph) : graph_(*graph) {
        compiled_.graph = std::move(graph);
        compiled_.statistics.nodes = graph_.nodes.size();
        for (const Node& node : graph_.nodes) nodes_[node.name] = &node;
    }

    Compiled run() {
        const Node* last = nullptr;
        for (const Node& node : graph_.nodes) {
            if (node.type == "NetOutput") last = &node;
        }
        TORCH_CHECK(last != nullptr, "the graph has no outputs");
        for (const Node& node : graph_.nodes) {  // in the graph's own order, which keeps to that of the program
            if (reaches(node, *last)) visit(node);
        }
        compiled_.statistics.removed = graph_.nodes.size() - visited_.size();
        for (const Source& source : last->inputs) compiled_.outputs.push_back(value_of(source));
        fuse_transposes(compiled_);
        convert_formats(compiled_);
        write_outputs_directly();
        place_constants();
        plan_memory(compiled_);
        return std::move(compiled_);
    }

private:
    // Whether the graph's outputs need the node.
    bool reaches(const Node& node, const Node& last) {
        if (needed_.empty()) mark(last);
        return needed_.count(node.name) != 0;
    }

    void mark(const Node& node) {
        std::vector<const Node*> stack{&node};
        while (!stack.empty()) {
            const Node& next = *stack.back();
            stack.pop_back();
            if (!needed_.insert(next.name).second) continue;
            for (const auto* sources : {&next.inputs, &next.after}) {
                for (const Source& source : *sources) {
                    if (!source.node.empty()) stack.push_back(&node_of(source));
                }
            }
        }
    }

    const Node& node_of(const Source& source) const {
        const auto found = nodes_.find(source.node);
        TORCH_CHECK(found != nodes_.end(), "the graph has no node ", source.node);
        return *found->second;
    }

    // Appends the node's step, after those of the nodes that it needs.
    void visit(const Node& node) {
        if (!visited_.insert(node.name).second) return;
        for (const auto* sources : {&node.inputs, &node.after}) {
            for (const Source& source : *sources) {
                if (!source.node.empty()) visit(node_of(source));
            }
        }
        try {
            add(node);
        } catch (const c10::Error& error) {
            fail(node, error.what_without_backtrace());
        } catch (const std::exception& error) {
            fail(node, error.what());
        }
    }

    [[noreturn]] void fail(const Node& node, const std::string& reason) const {
        std::string where = "GE operator " + node.type + " (node " + node.name;
        const std::string origin = fx_name(node);
        if (!origin.empty()) where += ", FX node " + origin;
        throw std::runtime_error(where + "): " + reason);
    }

    // Only the last node of a converter carries the name of the FX node; others are found through who uses them.
    std::string fx_name(const Node& node) const {
        for (const Declared& desc : node.output_descs) {
            if (!desc.fx_name.empty()) return desc.fx_name.substr(0, desc.fx_name.find(".OUTPUT"));
        }
        for (const Node& user : graph_.nodes) {
            for (const Source& source : user.inputs) {
                if (source.node == node.name) return fx_name(user);
            }
        }
        return "";
    }

    int value_of(const Source& source) const {
        if (source.node.empty()) return -1;
        return outputs_of_.at(source.node).at(source.index);
    }

    int new_value(Value value) {
        const int index = static_cast<int>(compiled_.values.size());
        if (value.memory < 0) value.memory = index;
        compiled_.values.push_back(std::move(value));
        return index;
    }

    void add(const Node& node) {
        if (node.type == "NetOutput") return;
        if (node.type == "Data" || node.type == "RefData") {
            outputs_of_[node.name] = {new_value(input_value(node))};
        } else if (node.type == "Const" || node.type == "Constant") {
            outputs_of_[node.name] = {new_value(constant(std::get<Tensor>(node.attributes.at("value"))))};
        } else if (node.type == "ConstPlaceHolder") {
            outputs_of_[node.name] = {new_value(weight_value(node))};
        } else {
            add_operation(node);
        }
    }

    static Value input_value(const Node& node) {
        const Declared& desc = node.output_descs.at(0);
        Value value;
        value.place = desc.on_host ? Value::Place::kFeature : Value::Place::kInput;
        value.input = static_cast<int>(integer(node, "index"));
        TORCH_CHECK(desc.dtype.has_value(), "the data type is not emulated");
        value.dtype = *desc.dtype;
        value.sizes = desc.sizes;
        if (is_private(desc.format)) value.format = static_cast<aclFormat>(desc.format);
        for (int64_t size : value.sizes) {
            TORCH_CHECK(size >= 0, "dynamic shapes are not emulated: compile with dynamic=False");
        }
        return value;
    }

    static Value constant(Tensor known) {
        Value value;
        value.place = Value::Place::kConstant;
        value.dtype = known.scalar_type();
        value.sizes = known.sizes().vec();
        value.known = std::move(known);
        return value;
    }

    static Value weight_value(const Node& node) {
        Value value;
        value.place = Value::Place::kWeight;
        value.dtype = from_acl(static_cast<aclDataType>(integer(node, "dtype")));
        value.sizes = integers(node, "origin_shape");
        TensorArgument& weight = value.weight;
        weight.dtype = value.dtype;
        weight.sizes = value.sizes;
        const auto strides = c10::contiguous_strides(value.sizes);
        weight.strides.assign(strides.begin(), strides.end());
        weight.offset = 0;
        weight.format = static_cast<aclFormat>(integer(node, "storage_format"));
        if (is_private(weight.format)) value.format = weight.format;
        weight.storage_sizes = integers(node, "storage_shape");
        weight.data = reinterpret_cast<char*>(integer(node, "addr"));
        return value;
    }

    void add_operation(const Node& node) {
        const Operation* operation = find_operation(node.type);
        TORCH_CHECK(operation != nullptr,
                    "the operator is not emulated; see 'Adding an operator' in emulator/README.md");
        Step step{&node, operation, {}, {}};
        for (const Source& source : node.inputs) step.inputs.push_back(value_of(source));
        const bool foldable = can_fold(step);
        const Operands operands = operands_of(step, foldable);
        const Results results = operation->kernel(operands);
        check_attributes(operands);
        TORCH_CHECK(results.size() >= used_outputs(node), "the emulated operator has ", results.size(), " outputs");
        bool all_known = true, is_free = false;
        for (size_t i = 0; i < results.size(); ++i) {
            Value value;
            value.dtype = dtype_of(results[i], operands);
            value.sizes = results[i].value.sizes().vec();
            check(node, i, value);
            // A kernel that returns values while it is only asked for shapes depends on nothing else.
            if (!results[i].value.is_meta()) {
                const Tensor known = at::empty(value.sizes, value.dtype);
                write(*operation, results[i], on_host(known));
                value = constant(known);
            } else {
                all_known = false;
                is_free = renames(step, value);
                if (is_free || step.operation->kind == Kind::kAssigns) value = alias(step.inputs[0], value);
            }
            step.outputs.push_back(new_value(std::move(value)));
        }
        outputs_of_[node.name] = step.outputs;
        if (all_known) {
            ++compiled_.statistics.folded;
        } else if (is_free) {
            ++compiled_.statistics.views;
        } else {
            TORCH_CHECK(refuse(compiled_, step) == 0, recent_message());
            compiled_.steps.push_back(std::move(step));
        }
    }

    // Only what is known on the host: GE does not compute with the frozen parameters, which lie on the device.
    bool can_fold(const Step& step) const {
        for (int input : step.inputs) {
            if (input >= 0 && compiled_.values[input].place != Value::Place::kConstant) return false;
        }
        return step.operation->kind != Kind::kAssigns;
    }

    Operands operands_of(const Step& step, bool with_values) const {
        std::vector<Operands::Input> inputs;
        for (size_t i = 0; i < step.inputs.size(); ++i) {
            Operands::Input input;
            if (i < step.node->input_descs.size()) input.name = step.node->input_descs[i].name;
            if (step.inputs[i] >= 0) {
                const Value& value = compiled_.values[step.inputs[i]];
                input.known = value.known;
                const auto meta = at::device(at::kMeta).dtype(value.dtype);
                input.tensor = with_values ? value.known : at::empty(value.sizes, meta);
            }
            inputs.push_back(std::move(input));
        }
        return Operands(std::move(inputs), step.node->attributes, step.node->output_descs.size());
    }

    static TensorArgument on_host(const Tensor& tensor) {
        const Ints sizes = tensor.sizes().vec();
        char* data = static_cast<char*>(tensor.data_ptr());
        return {tensor.scalar_type(), sizes, tensor.strides().vec(), 0, ACL_FORMAT_ND, sizes, data};
    }

    static void check_attributes(const Operands& operands) {
        for (const std::string& name : operands.unread_attributes()) {
            TORCH_CHECK(is_annotation(name), "the attribute ", name, " is not emulated");
        }
    }

    size_t used_outputs(const Node& node) const {
        size_t used = 0;
        for (const Node& user : graph_.nodes) {
            if (needed_.count(user.name) == 0) continue;
            for (const Source& source : user.inputs) {
                if (source.node == node.name) used = std::max<size_t>(used, source.index + 1);
            }
        }
        return used;
    }

    static void check(const Node& node, size_t output, const Value& value) {
        if (output >= node.output_descs.size()) return;
        const Declared& desc = node.output_descs[output];
        TORCH_CHECK(!desc.described || !desc.dtype || *desc.dtype == value.dtype, "output ", output, " is ",
                    dtype_name(value.dtype), ", but FX has ", dtype_name(*desc.dtype));
    }

    // Whether nothing has to run: other dimensions for the same memory, which a private format would not survive (such
    // a weight is copied), or a conversion to the dtype that is there already.
    bool renames(const Step& step, const Value& result) const {
        const bool casts = step.node->type == "Cast";
        if (!casts && step.operation->kind != Kind::kViews) return false;
        const Value& source = compiled_.values[step.inputs.at(0)];
        return casts ? source.dtype == result.dtype : !is_private(source.format);
    }

    // The same memory under another shape.
    Value alias(int source, Value value) const {
        const Value& base = compiled_.values[source];
        value.memory = base.memory;
        value.place = base.place;
        return value;
    }

    // A result that is only handed out is computed into the memory that torchair gave for it.
    void write_outputs_directly() {
        for (size_t i = 0; i < compiled_.outputs.size(); ++i) {
            Value& value = compiled_.values[compiled_.values[compiled_.outputs[i]].memory];
            const bool whole = value.bytes() == compiled_.values[compiled_.outputs[i]].bytes();
            if (value.place == Value::Place::kFeature && value.output < 0 && whole) value.output = static_cast<int>(i);
        }
    }

    // Constants that a step reads as tensors are copied to the device once.
    void place_constants() {
        constexpr size_t kAlignment = 32;
        std::unordered_set<int> placed;
        const auto place = [&](int index) {
            if (index < 0) return;
            Value& value = compiled_.values[compiled_.values[index].memory];
            if (value.place != Value::Place::kConstant || !placed.insert(compiled_.values[index].memory).second) return;
            value.offset = static_cast<int64_t>(compiled_.constant_bytes);
            compiled_.constant_bytes += (value.bytes() + kAlignment - 1) / kAlignment * kAlignment;
        };
        for (const Step& step : compiled_.steps) {
            for (int input : step.inputs) place(input);
        }
        for (int output : compiled_.outputs) place(output);
    }

    const Graph& graph_;
    Compiled compiled_;
    std::unordered_map<std::string, const Node*> nodes_;
    std::unordered_map<std::string, std::vector<int>> outputs_of_;
    std::unordered_set<std::string> needed_, visited_;
};

}  // namespace

size_t Value::bytes() const { return c10::multiply_integers(sizes) * c10::elementSize(dtype); }

Compiled compile(std::shared_ptr<const Graph> graph) { return Compiler(std::move(graph)).run(); }

}  // namespace cann::graph
