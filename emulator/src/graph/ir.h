// The graph as torchair hands it over: the messages of GE's intermediate representation (ge_ir.proto) that matter here.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace cann::graph {

using Ints = std::vector<int64_t>;
using Attribute = std::variant<std::monostate, int64_t, double, std::string, Ints, std::vector<double>,
                               std::vector<std::string>, std::vector<Ints>, at::Tensor>;
using Attributes = std::map<std::string, Attribute>;

// What one input or output is declared to be.
struct Declared {
    std::string name;                     // in the operator's prototype
    std::optional<at::ScalarType> dtype;  // none: torch has no such type, or nothing is fed
    Ints sizes;
    int64_t format = 2;      // ACL_FORMAT_ND
    std::string fx_name;     // of the FX tensor that this is: "mul-aten.mul.Tensor.OUTPUT.0"
    bool described = false;  // by FX; of all others GE itself has to find the dtype and the shape
    bool absent = false;     // an optional input that is not fed
    bool on_host = false;
};

struct Source {
    std::string node;  // empty: not fed
    int index = 0;     // of that node's output; -1 for an order without data
};

struct Node {
    std::string name, type;
    std::vector<Source> inputs;  // as the prototype orders them
    std::vector<Source> after;   // nodes that must run before
    std::vector<Declared> input_descs, output_descs;
    Attributes attributes;
};

struct Graph {
    std::string name;
    std::vector<Node> nodes;
};

// Reads a serialized ModelDef; throws std::exception for anything else.
Graph parse_model(std::string_view serialized);

}  // namespace cann::graph
