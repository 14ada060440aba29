// In which dtypes a model computes: ATC's --precision_mode and --precision_mode_v2.
#pragma once

#include <string>

#include "graph/ir.h"

namespace cann::offline {

enum class Precision {
    kOrigin,         // as the model has it
    kHalf,           // all in float16
    kCubeInHalf,     // all in float32, products of operands that are rounded to float16
    kMatrixHalf,     // products and convolutions in float16, the rest as the model has it
    kMatrixBfloat,   // in bfloat16
};

// The precision of a mode's name; at most one of both may be given, none is float16. Throws Refusal.
Precision precision_of(const std::string& mode, const std::string& mode_v2);

// Makes the graph compute so. Its inputs and outputs keep their dtypes: conversions are inserted behind the Data nodes
// and before NetOutput, constants are converted here. Throws Refusal.
void set_precision(graph::Graph& graph, Precision precision);

// The graph's node that ends it. Throws Refusal where there is none.
graph::Node& net_output(graph::Graph& graph);

// A node that converts output `index` of `source` to `dtype`.
graph::Node make_cast(const std::string& name, const graph::Source& source, at::ScalarType dtype);

// Whatever reads the first output of `from` reads that of `to` instead.
void redirect(graph::Graph& graph, const std::string& from, const std::string& to);

}  // namespace cann::offline
