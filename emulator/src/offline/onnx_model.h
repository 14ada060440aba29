// The messages of ONNX (onnx.proto) as far as they matter here.
#pragma once

#include "offline/onnx.h"

namespace cann::offline {

// An input or output of the model. Sizes are -1 where the model leaves them open.
struct OnnxValue {
    std::string name;
    std::optional<at::ScalarType> dtype;
    graph::Ints sizes;
};

struct OnnxNode {
    std::string name, type, domain;
    std::vector<std::string> inputs, outputs;  // names of values; empty: not given
    graph::Attributes attributes;  // those that hold graphs are empty
};

struct OnnxInitializer {
    std::string name;
    at::Tensor value;
};

struct OnnxModel {
    std::map<std::string, int64_t> opsets;  // of each domain; "ai.onnx" is ONNX's own
    std::string name;
    std::vector<OnnxNode> nodes;
    std::vector<OnnxInitializer> initializers;
    std::vector<OnnxValue> inputs, outputs;
};

// Throws Refusal. `directory`: of external data.
OnnxModel read_onnx(std::string_view serialized, const std::string& directory);

// The dtype that ONNX gives this number; none for one that torch does not have.
std::optional<at::ScalarType> dtype_of_onnx(int64_t number);

// A serialized TensorProto, with its name. The tensor owns its memory.
OnnxInitializer read_tensor(std::string_view serialized, const std::string& directory);

}  // namespace cann::offline
