// How to declare what CANN's parser makes of an operator of ONNX, and in which opsets it knows it:
//
//     ONNX(Add, 8, 18, x.last("Add", {{"x1", x[0]}, {"x2", x[1]}}))
//
// `x` is the ONNX node: x[0] is where its first input comes from, x.integer("axis", 0) an attribute. An attribute that
// the expression does not read is an error, as its value might matter.
#pragma once

#include <functional>
#include <set>

#include "offline/onnx_model.h"

namespace cann::offline {

using graph::Attributes;
using graph::Ints;
using graph::Source;

struct Input {
    const char* name;  // in the prototype of GE's operator
    Source source;
};

// One ONNX node on its way to one or more nodes of GE.
class Translation {
public:
    // Where the values of the ONNX graph come from, and what the constants among them are.
    struct Values {
        std::map<std::string, Source> sources;
        std::map<std::string, at::Tensor> known;
    };

    Translation(const OnnxNode& node, int64_t opset, Values& values, std::vector<graph::Node>& nodes)
        : opset(opset), node_(node), values_(values), nodes_(nodes) {}

    const int64_t opset;

    // ---- the ONNX node ----
    size_t inputs() const { return node_.inputs.size(); }
    size_t outputs() const { return node_.outputs.size(); }
    bool has(size_t input) const { return input < node_.inputs.size() && !node_.inputs[input].empty(); }
    Source operator[](size_t input) const;   // must be given
    Source optional(size_t input) const;     // empty if it is not given
    std::optional<at::Tensor> known(size_t input) const;  // the value, if it is a constant of the model
    bool has(const char* attribute) const { return node_.attributes.count(attribute) != 0; }
    int64_t integer(const char* name, int64_t otherwise) const { return either<int64_t>(name, otherwise); }
    double real(const char* name, double otherwise) const { return either<double>(name, otherwise); }
    std::string text(const char* name, const char* otherwise) const { return either<std::string>(name, otherwise); }
    Ints list(const char* name, const Ints& otherwise = {}) const { return either<Ints>(name, otherwise); }
    at::Tensor tensor(const char* name, const at::Tensor& otherwise) const { return either(name, otherwise); }

    // ---- GE's nodes ----
    // One on the way to the result.
    Source add(const char* type, const std::vector<Input>& inputs, Attributes attributes = {}, size_t outputs = 1);
    // A constant.
    Source constant(const at::Tensor& value);
    Source constant(const Ints& values) { return constant(at::tensor(values, at::kLong)); }
    // The one whose outputs are those of the ONNX node, and which has its name.
    void last(const char* type, const std::vector<Input>& inputs, Attributes attributes = {});
    // The outputs, where several nodes make them.
    void give(const std::vector<Source>& sources);

    // CANN refuses the node: its code, and the text, which the name of the node is put behind.
    [[noreturn]] void refuse(const char* code, const std::string& reason) const;
    // CANN would take the node and compute something else, or the emulator does not have it.
    [[noreturn]] void refuse(const std::string& reason) const;

    // Throws Refusal for an attribute that nothing has asked for.
    void check_attributes() const;

private:
    template <class T>
    T either(const char* name, T otherwise) const;
    std::string unique_name(const char* type);
    std::string where() const;

    const OnnxNode& node_;
    Values& values_;
    std::vector<graph::Node>& nodes_;
    mutable std::set<std::string> read_;
    int added_ = 0;
};

struct OnnxOperator {
    int64_t first_opset, last_opset;
    std::function<void(Translation&)> translate;
};
// Throws Refusal where CANN has no parser for it, "ai.onnx::19::Add".
const OnnxOperator& find_onnx_operator(const std::string& domain, int64_t opset, const std::string& type);

struct OnnxRegistration {
    OnnxRegistration(const char* type, int64_t first_opset, int64_t last_opset, std::function<void(Translation&)> translate);
};

}  // namespace cann::offline

#define ONNX_REGISTRATION_2(LINE, NAME, FIRST, LAST, ...)                                                           \
    namespace cann::offline {                                                                                       \
    static const OnnxRegistration registration_##NAME##_##LINE(#NAME, FIRST, LAST, [](Translation& x) { __VA_ARGS__; }); \
    }
#define ONNX_REGISTRATION(LINE, ...) ONNX_REGISTRATION_2(LINE, __VA_ARGS__)
#define ONNX(NAME, FIRST, LAST, ...) ONNX_REGISTRATION(__LINE__, NAME, FIRST, LAST, __VA_ARGS__)
