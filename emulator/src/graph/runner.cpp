#include "graph/runner.h"

#include "graph/calls.h"
#include "runtime/stream.h"

namespace cann::graph {
namespace {

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

namespace {

void copy_from_host(const Compiled& compiled, const Memory& memory) {
    for (const Value& value : compiled.values) {
        const bool needed = value.place == Value::Place::kFeature && value.input >= 0 && value.offset >= 0;
        if (needed) std::memcpy(memory.features + value.offset, memory.from_host.at(value.input).data(), value.bytes());
    }
}

}  // namespace

int run(const Compiled& compiled, const Memory& memory, const Stream& stream) {
    copy_from_host(compiled, memory);
    for (const Step& step : compiled.steps) {
        Executor executor{call_of(compiled, step, &memory), {}};
        executor.run = [&] { execute(compiled, step, executor.call); };
        if (const int code = run_now(executor, stream)) return code;
    }
    for (size_t i = 0; i < compiled.outputs.size(); ++i) {
        const auto source = argument_of(compiled, compiled.outputs[i], &memory);
        if (source->data != memory.outputs[i].data) move(memory.outputs[i].read(), source->read());
    }
    return 0;
}

}  // namespace cann::graph
