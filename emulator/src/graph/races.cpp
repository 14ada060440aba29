// What a run of a graph does to memory, for the check for races: each step is a task of its own.
#include "races/check.h"

#include "graph/calls.h"

namespace cann::graph {
namespace {

races::Footprint footprint_of(const Value& value, const char* memory) {
    return races::Footprint::of(memory + value.offset, value.bytes());
}

// What run() writes before the first step.
std::vector<races::Use> preparation(const Compiled& compiled, const Memory& memory, bool loads_constants) {
    std::vector<races::Use> uses;
    for (const Value& value : compiled.values) {
        if (value.offset < 0) continue;
        const bool is_constant = value.place == Value::Place::kConstant;
        const bool comes_from_host = value.place == Value::Place::kFeature && value.input >= 0;
        if (is_constant && loads_constants) uses.push_back({"a constant", footprint_of(value, memory.constants), true});
        if (comes_from_host) uses.push_back({"an input from the host", footprint_of(value, memory.features), true});
    }
    return uses;
}

}  // namespace

void check_races(const Compiled& compiled, const Memory& memory, const Stream& stream, bool loads_constants) {
    if (!races::enabled()) return;
    races::launch(stream, compiled.graph->name, preparation(compiled, memory, loads_constants));
    for (const Step& step : compiled.steps) races::launch(stream, call_of(compiled, step, &memory));
    Call rest{"", {}, compiled.graph->name.c_str()};
    for (size_t i = 0; i < compiled.outputs.size(); ++i) {
        const auto source = argument_of(compiled, compiled.outputs[i], &memory);
        if (source->data == memory.outputs[i].data) continue;
        rest.arguments.push_back({"an output within the graph", {source}, ""});
        rest.arguments.push_back({"an output", {std::make_shared<TensorArgument>(memory.outputs[i])}, "", false, true});
    }
    races::launch(stream, rest);
}

}  // namespace cann::graph
