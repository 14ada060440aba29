#include "graph/calls.h"

#include <c10/util/strides.h>

namespace cann::graph {
namespace {

TensorArgument plain(const Value& value, char* data) {
    const auto strides = c10::contiguous_strides(value.sizes);
    return {value.dtype, value.sizes, {strides.begin(), strides.end()}, 0, ACL_FORMAT_ND, value.sizes, data};
}

char* address_of(const Compiled& compiled, const Value& value, const Memory* memory) {
    const Value& base = compiled.values[value.memory];
    if (memory == nullptr) return nullptr;
    if (base.output >= 0) return memory->outputs.at(base.output).data;
    switch (base.place) {
        case Value::Place::kInput: return memory->inputs.at(base.input).data;
        case Value::Place::kConstant: return memory->constants + base.offset;
        case Value::Place::kWeight: return base.weight.data;
        default: return memory->features + base.offset;
    }
}

}  // namespace

std::shared_ptr<TensorArgument> argument_of(const Compiled& compiled, int index, const Memory* memory) {
    const Value& value = compiled.values[index];
    const bool itself = value.memory == index;
    if (itself && value.place == Value::Place::kWeight) return std::make_shared<TensorArgument>(value.weight);
    if (itself && value.place == Value::Place::kInput && memory != nullptr) {
        return std::make_shared<TensorArgument>(memory->inputs.at(value.input));
    }
    return std::make_shared<TensorArgument>(plain(value, address_of(compiled, value, memory)));
}

namespace {

std::string text_of(const Attribute& attribute) {
    if (const auto* integer = std::get_if<int64_t>(&attribute)) return std::to_string(*integer);
    if (const auto* real = std::get_if<double>(&attribute)) return to_text(at::Scalar(*real));
    if (const auto* text = std::get_if<std::string>(&attribute)) return *text;
    if (const auto* list = std::get_if<Ints>(&attribute)) return to_text(*list);
    return "";
}

// Operators of GE that are operators of aclnn under other names: the rules of the profiles know them by those.
struct Namesake {
    const char* aclnn;
    std::map<std::string, std::string> parameters;
};
const Namesake* find_namesake(const std::string& type) {
    const std::map<std::string, std::string> matrices{{"x1", "self"}, {"x2", "mat2"}};
    static const std::map<std::string, Namesake> namesakes{
        {"AddLayerNorm", {"AddLayerNorm", {}}},
        {"BatchMatMul", {"BatchMatMul", matrices}},
        {"BatchMatMulV2", {"BatchMatMul", matrices}},
        {"BatchMatMulV3", {"BatchMatMul", matrices}},
        {"Conv2D", {"Convolution", {{"x", "input"}, {"filter", "weight"}, {"y", "output"}}}},
        {"FlashAttentionScore",
         {"FlashAttentionScore", {{"pre_tockens", "preTokens"}, {"next_tockens", "nextTokens"}}}},
        {"FusedInferAttentionScore", {"FusedInferAttentionScoreV3", {{"key0", "key"}, {"value0", "value"}}}},
        {"GeGluV2", {"GeGluV3", {{"x", "self"}}}},
        {"GroupNormSilu", {"GroupNormSilu", {{"x", "self"}, {"num_groups", "group"}}}},
        {"GroupedMatmul", {"GroupedMatmulV5", {{"x0", "x"}, {"weight0", "weight"}, {"y0", "out"}}}},
        {"MatMul", {"Matmul", matrices}},
        {"MatMulV2", {"Matmul", matrices}},
        {"MatMulV3", {"Matmul", matrices}},
        {"MoeFinalizeRouting", {"MoeFinalizeRouting", {}}},
        {"MoeFinalizeRoutingV2", {"MoeFinalizeRoutingV2", {}}},
        {"MoeGatingTopKSoftmax", {"MoeGatingTopKSoftmax", {}}},
        {"MoeInitRouting", {"MoeInitRouting", {}}},
        {"MoeInitRoutingV3", {"MoeInitRoutingV3", {}}},
        {"PromptFlashAttention", {"PromptFlashAttentionV3", {}}},
        {"RmsNorm", {"RmsNorm", {}}},
        {"SwiGlu", {"SwiGlu", {}}},
        {"WeightQuantBatchMatmulV2",
         {"WeightQuantBatchMatmulV2",
          {{"antiquant_offset", "antiquantOffsetOptional"},
           {"quant_scale", "quantScaleOptional"},
           {"quant_offset", "quantOffsetOptional"},
           {"bias", "biasOptional"}}}},
    };
    static const Namesake lists{"Foreach", {}};  // one name for all of them
    if (type.starts_with("Foreach")) return &lists;
    const auto found = namesakes.find(type);
    return found == namesakes.end() ? nullptr : &found->second;
}

// atten_mask in GE is attenMask in aclnn.
std::string in_camel_case(const std::string& name) {
    std::string result;
    for (size_t i = 0; i < name.size(); ++i) {
        if (name[i] == '_' && i + 1 < name.size()) result += static_cast<char>(std::toupper(name[++i]));
        else result += name[i];
    }
    return result;
}

}  // namespace

Call call_of(const Compiled& compiled, const Step& step, const Memory* memory) {
    Call call{step.node->type.c_str(), {}};
    call.graph = compiled.graph->name.c_str();
    const auto add = [&](const std::vector<Declared>& descs, const std::vector<int>& values, bool written) {
        for (size_t i = 0; i < values.size(); ++i) {
            Argument argument;
            argument.name = i < descs.size() ? descs[i].name : std::to_string(i);
            argument.stored = true;
            argument.written = written;
            if (values[i] >= 0) argument.tensors.push_back(argument_of(compiled, values[i], memory));
            call.arguments.push_back(std::move(argument));
        }
    };
    add(step.node->input_descs, step.inputs, false);
    add(step.node->output_descs, step.outputs, true);
    for (const auto& [name, attribute] : step.node->attributes) {
        if (name[0] != '_') call.arguments.push_back({name, {}, text_of(attribute)});
    }
    return call;
}

int refuse(const Compiled& compiled, const Step& step) {
    Call call = call_of(compiled, step, nullptr);
    const Namesake* namesake = find_namesake(step.node->type);
    call.operator_name = namesake ? namesake->aclnn : "";
    // Keys and counters of random numbers are of a type that only the chips' own processors have.
    std::erase_if(call.arguments, [](const Argument& argument) {
        return !argument.tensors.empty() && argument.tensors[0]->dtype == at::kUInt64;
    });
    for (Argument& argument : call.arguments) {
        if (namesake == nullptr) break;
        const auto renamed = namesake->parameters.find(argument.name);
        argument.name = renamed == namesake->parameters.end() ? in_camel_case(argument.name) : renamed->second;
    }
    return cann::refuse(call);
}

}  // namespace cann::graph
