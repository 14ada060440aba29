// The trace's line about a compiled graph.
#include <map>
#include <sstream>

#include "graph/compiler.h"

namespace cann::graph {

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
    line << "}}";
    return line.str();
}

}  // namespace cann::graph
