// How to declare an operator of GE's intermediate representation. One line serves compiled graphs and the old aclop
// interface:
//
//     GE(Add, x.up(0) + x.up(1))
//
// The expression sees its operands as `x` and returns a tensor, or Results for several outputs. A float32 result of
// 16-bit operands is rounded to their dtype; as() names another one. The same expression finds shapes and dtypes when
// a graph is compiled: tensors are meta tensors then, and only x.ints() and its kin have values.
#pragma once

#include <functional>
#include <set>

#include "graph/ir.h"
#include "ops/numerics.h"
#include "ops/tensor.h"

namespace cann::graph {

using at::Tensor;
using at::ScalarType;

class Operands {
public:
    // One input: undefined tensors were not fed. `known` has the values of a constant.
    struct Input {
        std::string name;
        Tensor tensor, known;
    };

    Operands(std::vector<Input> inputs, const Attributes& attributes, size_t outputs)
        : outputs(outputs), inputs_(std::move(inputs)), attributes_(attributes) {}

    size_t size() const { return inputs_.size(); }
    Tensor operator[](size_t index) const { return index < inputs_.size() ? inputs_[index].tensor : Tensor(); }
    Tensor operator[](std::string_view name) const;
    Tensor up(size_t index) const { return cann::up((*this)[index]); }  // 16-bit floating point as float32
    std::vector<Tensor> from(size_t first, size_t last = SIZE_MAX) const;  // the inputs from first up to last
    Ints ints(size_t index) const;  // the values of an input that must be known when the graph is compiled
    Ints ints(std::string_view name) const;

    int64_t integer(const char* name) const { return required<int64_t>(name); }
    int64_t integer(const char* name, int64_t otherwise) const { return either<int64_t>(name, otherwise); }
    double real(const char* name, double otherwise) const { return either<double>(name, otherwise); }
    bool flag(const char* name, bool otherwise = false) const { return either<int64_t>(name, otherwise) != 0; }
    std::string text(const char* name, const char* otherwise) const { return either<std::string>(name, otherwise); }
    Ints list(const char* name, const Ints& otherwise = {}) const { return either<Ints>(name, otherwise); }
    ScalarType dtype(const char* name) const { return from_acl(static_cast<aclDataType>(integer(name))); }
    ScalarType dtype(const char* name, ScalarType otherwise) const;

    bool compiling() const;  // shapes are asked for, not values
    std::vector<std::string> unread_attributes() const;

    const size_t outputs;  // how many are declared

private:
    template <class T>
    T required(const char* name) const;
    template <class T>
    T either(const char* name, T otherwise) const;
    const Input& find(std::string_view name) const;

    std::vector<Input> inputs_;
    const Attributes& attributes_;
    mutable std::set<std::string> read_;
};

struct Result {
    Result(Tensor value) : value(std::move(value)) {}
    Result(Tensor value, ScalarType dtype) : value(std::move(value)), dtype(dtype) {}

    Tensor value;
    std::optional<ScalarType> dtype;  // to be rounded to; none: as the operands have it
};
using Results = std::vector<Result>;
inline Result as(ScalarType dtype, Tensor value) { return {std::move(value), dtype}; }

enum class Kind {
    kComputes,  // rounds, and saturates where the chip does
    kMoves,     // passes values on unchanged
    kViews,     // only renames the dimensions of its first input: nothing is launched
    kAssigns,   // writes into its first input, which is also its output
};

struct Operation {
    const char* name;
    Kind kind;
    std::function<Results(const Operands&)> kernel;
};

// The operator of that name, nullptr if nobody has declared it.
const Operation* find_operation(const std::string& type);
// The dtype of a result (see above).
ScalarType dtype_of(const Result& result, const Operands& operands);
// Writes a result to where it belongs.
void write(const Operation& operation, const Result& result, const TensorArgument& target);

struct Registration {
    Registration(const char* name, Kind kind, std::function<Results(const Operands&)> kernel);
};
inline Results results(Results several) { return several; }
inline Results results(Result one) { return {std::move(one)}; }
inline Results results(Tensor one) { return {Result(std::move(one))}; }

}  // namespace cann::graph

#define GE_OPERATOR(NAME, KIND, ...)                                                             \
    namespace cann::graph {                                                                      \
    static const Registration registration_##NAME(#NAME, KIND, [](const Operands& x) -> Results { \
        return results(__VA_ARGS__);                                                             \
    });                                                                                          \
    }
#define GE(NAME, ...) GE_OPERATOR(NAME, Kind::kComputes, __VA_ARGS__)
#define GE_MOVES(NAME, ...) GE_OPERATOR(NAME, Kind::kMoves, __VA_ARGS__)
#define GE_VIEWS(NAME, ...) GE_OPERATOR(NAME, Kind::kViews, __VA_ARGS__)
#define GE_ASSIGNS(NAME, ...) GE_OPERATOR(NAME, Kind::kAssigns, __VA_ARGS__)
