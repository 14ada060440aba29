// A compiled graph: which operators run in which order, on what memory.
#pragma once

#include <memory>

#include "graph/operation.h"

namespace cann::graph {

// A tensor of the graph.
struct Value {
    enum class Place { kInput, kConstant, kWeight, kFeature };

    Place place = Place::kFeature;
    ScalarType dtype = at::kFloat;
    Ints sizes;
    Tensor known;            // of a constant: what it holds
    TensorArgument weight{};  // of a frozen parameter: where it lies, and how it is stored
    aclFormat format = ACL_FORMAT_ND;  // of an input or a frozen parameter: how it is stored, if not plainly
    int input = -1;          // which one it is; those in host memory are copied to the features first
    int output = -1;         // the one that it is written to directly
    int memory = -1;         // the value whose memory it shares; itself, if it has its own
    int64_t offset = -1;     // in the memory of constants or of features; -1: not needed there

    size_t bytes() const;
};

struct Step {
    const Node* node;
    const Operation* operation;
    std::vector<int> inputs, outputs;  // values; -1 for an input that is not fed
};

// What became of the nodes, for the trace.
struct Statistics {
    size_t nodes = 0, folded = 0, fused = 0, removed = 0, views = 0;
};

struct Compiled {
    std::shared_ptr<const Graph> graph;  // the steps point into it
    std::vector<std::unique_ptr<Node>> changed;  // or to these
    std::vector<Value> values;
    std::vector<Step> steps;
    std::vector<int> outputs;            // values
    size_t constant_bytes = 0, feature_bytes = 0;
    Statistics statistics;
};

// Throws std::exception; its text names the operator, the node and the FX node that it came from.
Compiled compile(std::shared_ptr<const Graph> graph);

// Lets matrix products read transposed operands as they are stored, and drops the steps that nothing needs any more.
void fuse_transposes(Compiled& compiled);

// Inserts the conversions between the formats that the operators want.
void convert_formats(Compiled& compiled);

// Gives every value of the feature memory a place in it. Values that are not needed at the same time share theirs.
void plan_memory(Compiled& compiled);

std::string trace_line(const Compiled& compiled);

}  // namespace cann::graph
