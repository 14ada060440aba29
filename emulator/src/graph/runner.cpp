#include "graph/runner.h"

#include <c10/util/strides.h>

#include "memory.h"
#include "operator.h"
#include "stream.h"

namespace cann::graph {
namespace {

TensorArgument plain(const Value& value, char* data) {
    const auto strides = c10::contiguous_strides(value.sizes);
    return {value.dtype, value.sizes, {strides.begin(), strides.end()}, 0, ACL_FORMAT_ND, value.sizes, data};
}

char* address_of(const Compiled& compiled, const Value& value, const Memory& memory) {
    const Value& base = compiled.values[value.memory];
    if (base.output >= 0) return memory.outputs.at(base.output).data;
    switch (base.place) {
        case Value::Place::kInput: return memory.inputs.at(base.input).data;
        case Value::Place::kConstant: return memory.constants + base.offset;
        case Value::Place::kWeight: return base.weight.data;
        default: return memory.features + base.offset;
    }
}

std::shared_ptr<TensorArgument> argument_of(const Compiled& compiled, int index, const Memory& memory) {
    const Value& value = compiled.values[index];
    const bool itself = value.memory == index;
    if (itself && value.place == Value::Place::kWeight) return std::make_shared<TensorArgument>(value.weight);
    if (itself && value.place == Value::Place::kInput) return std::make_shared<TensorArgument>(memory.inputs.at(value.input));
    return std::make_shared<TensorArgument>(plain(value, address_of(compiled, value, memory)));
}

std::string text_of(const Attribute& attribute) {
    if (const auto* integer = std::get_if<int64_t>(&attribute)) return std::to_string(*integer);
    if (const auto* real = std::get_if<double>(&attribute)) return to_text(at::Scalar(*real));
    if (const auto* text = std::get_if<std::string>(&attribute)) return *text;
    if (const auto* list = std::get_if<Ints>(&attribute)) return to_text(*list);
    return "";
}

// The step as a call: for the rules of the chip, the check of its memory, and the trace.
Call call_of(const Compiled& compiled, const Step& step, const Memory& memory) {
    Call call{step.node->type.c_str(), {}};
    call.graph = compiled.graph->name.c_str();
    const auto add = [&](const std::vector<Declared>& descs, const std::vector<int>& values) {
        for (size_t i = 0; i < values.size(); ++i) {
            Argument argument;
            argument.name = i < descs.size() ? descs[i].name : std::to_string(i);
            argument.stored = true;
            if (values[i] >= 0) argument.tensors.push_back(argument_of(compiled, values[i], memory));
            call.arguments.push_back(std::move(argument));
        }
    };
    add(step.node->input_descs, step.inputs);
    add(step.node->output_descs, step.outputs);
    for (const auto& [name, attribute] : step.node->attributes) {
        if (name[0] != '_') call.arguments.push_back({name, {}, text_of(attribute)});
    }
    return call;
}

void execute(const Compiled& compiled, const Step& step, const Call& call) {
    std::vector<Operands::Input> inputs;
    for (size_t i = 0; i < step.inputs.size(); ++i) {
        Operands::Input input{call.arguments[i].name, {}, {}};
        if (step.inputs[i] >= 0) {
            input.tensor = call.arguments[i].tensors[0]->read();
            input.known = compiled.values[step.inputs[i]].known;
        }
        inputs.push_back(std::move(input));
    }
    const Operands operands(std::move(inputs), step.node->attributes, step.outputs.size());
    const Results results = step.operation->kernel(operands);
    for (size_t i = 0; i < step.outputs.size(); ++i) {
        write(*step.operation, results.at(i), *call.arguments[step.inputs.size() + i].tensors[0]);
    }
}

}  // namespace

void load_constants(const Compiled& compiled, char* memory) {
    for (size_t i = 0; i < compiled.values.size(); ++i) {
        const Value& value = compiled.values[i];
        const bool whole = value.place == Value::Place::kConstant && value.memory == static_cast<int>(i);
        if (whole && value.offset >= 0) std::memcpy(memory + value.offset, value.known.data_ptr(), value.bytes());
    }
}

int run(const Compiled& compiled, const Memory& memory, const Stream& stream) {
    for (const Step& step : compiled.steps) {
        Executor executor{call_of(compiled, step, memory), {}};
        executor.run = [&] { execute(compiled, step, executor.call); };
        if (const int code = run_now(executor, stream)) return code;
    }
    for (size_t i = 0; i < compiled.outputs.size(); ++i) {
        const auto source = argument_of(compiled, compiled.outputs[i], memory);
        if (source->data != memory.outputs[i].data) move(memory.outputs[i].read(), source->read());
    }
    return 0;
}

int check_rules(const Compiled& compiled) {
    Memory nowhere;
    for (const Value& value : compiled.values) {
        if (value.place != Value::Place::kInput || value.input < 0) continue;
        nowhere.inputs.resize(std::max<size_t>(nowhere.inputs.size(), value.input + 1));
        nowhere.inputs[value.input] = plain(value, nullptr);
    }
    for (int output : compiled.outputs) nowhere.outputs.push_back(plain(compiled.values[output], nullptr));
    for (const Step& step : compiled.steps) {
        if (const int code = refuse(call_of(compiled, step, nowhere))) return code;
    }
    return 0;
}

}  // namespace cann::graph
