// The trace's line about a compiled graph.
#include <map>
#include <sstream>

#include "graph/compiler.h"

namespace cann::graph {
namespace {

void write_list(std::ostringstream& line, const char* name, const Compiled& compiled, const std::vector<int>& values) {
    line << ",\"" << name << "\":[";
    const char* comma = "";
    for (int index : values) {
        if (index < 0) continue;
        const Value& value = compiled.values[compiled.values[index].memory];
        if (value.place == Value::Place::kConstant || value.place == Value::Place::kWeight) continue;
        line << comma << compiled.values[index].memory;
        comma = ",";
    }
    line << "]";
}

// Which values a step reads and writes, those that share memory under one number, and the FX node that it ends.
void write_step(std::ostringstream& line, const Compiled& compiled, const Step& step) {
    line << "{\"operator\":\"" << step.node->type << "\",\"fx\":\"";
    for (const Declared& desc : step.node->output_descs) {
        if (desc.fx_name.empty()) continue;
        line << desc.fx_name.substr(0, desc.fx_name.find(".OUTPUT"));
        break;
    }
    line << "\"";
    write_list(line, "reads", compiled, step.inputs);
    write_list(line, "writes", compiled, step.outputs);
    line << "}";
}

}  // namespace

std::string trace_line(const Compiled& compiled) {
    std::map<std::string, size_t> operators;
    for (const Step& step : compiled.steps) ++operators[step.node->type];
    const Statistics& statistics = compiled.statistics;
    std::ostringstream line;
    line << "{\"event\":\"compile\",\"graph\":\"" << compiled.graph->name << "\",\"nodes\":" << statistics.nodes
         << ",\"launches\":" << compiled.steps.size() << ",\"folded\":" << statistics.folded << ",\"views\":"
         << statistics.views << ",\"fused\":" << statistics.fused << ",\"removed\":" << statistics.removed
         << ",\"TransData\":" << operators["TransData"]
         << ",\"Cast\":" << operators["Cast"] << ",\"feature_bytes\":" << compiled.feature_bytes
         << ",\"constant_bytes\":" << compiled.constant_bytes << ",\"operators\":{";
    const char* comma = "";
    for (const auto& [type, count] : operators) {
        if (count == 0) continue;
        line << comma << "\"" << type << "\":" << count;
        comma = ",";
    }
    line << "},\"steps\":[";
    comma = "";
    for (const Step& step : compiled.steps) {
        line << comma;
        write_step(line, compiled, step);
        comma = ",";
    }
    line << "]}";
    return line.str();
}

}  // namespace cann::graph
