// From a graph to an offline model: what ATC and aclgrphBuildModel do.
#pragma once

#include "offline/om.h"
#include "offline/precision.h"
#include "offline/profiles.h"

namespace cann::offline {

// ATC's options by their names, without the dashes; empty: not given.
struct BuildOptions {
    ShapeOptions shapes;
    std::string soc_version, precision_mode, precision_mode_v2, insert_op_conf;
    std::string output_type, out_nodes, input_fp16_nodes;
    std::string command_line;
};

// What can be told without the model. Throws Refusal.
void check(const BuildOptions& options);

// Compiles the graph for each profile. Throws Refusal.
OfflineModel build(graph::Graph graph, const std::string& name, const BuildOptions& options);

}  // namespace cann::offline
