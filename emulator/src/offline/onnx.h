// ONNX models as the graphs that cann::graph::compile() takes: what ATC and aclgrphParseONNX do first.
#pragma once

#include <stdexcept>

#include "graph/ir.h"

namespace cann::offline {

// What ATC refuses, with the code that it prints: "E16002". What only the emulator lacks, and what CANN would take and
// compute something else for, is E10055, "The operation is not supported. Reason: ...".
struct Refusal : std::runtime_error {
    Refusal(std::string code, const std::string& text) : std::runtime_error(text), code(std::move(code)) {}

    std::string code;
};
inline Refusal unsupported(const std::string& reason) {
    return {"E10055", "The operation is not supported. Reason: " + reason + "."};
}

// The graph of a serialized ModelProto. `directory` is where external data lies; empty for a model in memory, whose
// external data is refused.
//
// Data nodes: one for each input that is no initializer, in order; node and "index" say which, output_descs[0] has the
// dtype and the sizes, -1 where the model leaves one open. Nothing else depends on these sizes: a profile or
// --input_shape is put there, and the graph compiled.
// Const nodes: the tensor in "value" owns its memory, so that copies of the graph share the weights, and `serialized`
// may go.
// NetOutput: input i is the model's output i, and input_descs[i] has its dtype, its sizes as far as the model says
// them, and in `name` what an offline model calls it, "node:index:output".
//
// Throws Refusal.
graph::Graph parse_onnx(std::string_view serialized, const std::string& directory);

}  // namespace cann::offline
