#include "graph/operation.h"

#include <unordered_map>

#include <ATen/ExpandUtils.h>

#include "graph/shapes.h"
#include "ops/operator.h"

namespace cann::graph {
namespace {

std::unordered_map<std::string, Operation>& table() {
    static std::unordered_map<std::string, Operation> instance;
    return instance;
}

Ints values_of(const Operands::Input& input) {
    TORCH_CHECK(input.known.defined(), "the values of ", input.name, " must be known when the graph is compiled");
    const Tensor values = input.known.to(at::kLong).contiguous();
    return {values.data_ptr<int64_t>(), values.data_ptr<int64_t>() + values.numel()};
}

bool is_16_bit_float(const Tensor& tensor) {
    return tensor.defined() && (tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16);
}

}  // namespace

Registration::Registration(const char* name, Kind kind, std::function<Results(const Operands&)> kernel) {
    table().emplace(name, Operation{name, kind, std::move(kernel)});
}

const Operation* find_operation(const std::string& type) {
    const auto found = table().find(type);
    return found == table().end() ? nullptr : &found->second;
}

const Operands::Input& Operands::find(std::string_view name) const {
    static const Input none{"", {}, {}};
    for (const Input& input : inputs_) {
        if (input.name == name) return input;
    }
    return none;
}

Tensor Operands::operator[](std::string_view name) const { return find(name).tensor; }

std::vector<Tensor> Operands::from(size_t first, size_t last) const {
    std::vector<Tensor> tensors;
    for (size_t i = first; i < std::min(last, inputs_.size()); ++i) tensors.push_back(inputs_[i].tensor);
    return tensors;
}

Ints Operands::ints(size_t index) const {
    TORCH_CHECK(index < inputs_.size(), "input ", index, " is missing");
    return values_of(inputs_[index]);
}

Ints Operands::ints(std::string_view name) const {
    const Input& input = find(name);
    return input.tensor.defined() ? values_of(input) : Ints();
}

template <class T>
T Operands::required(const char* name) const {
    const auto found = attributes_.find(name);
    TORCH_CHECK(found != attributes_.end(), "the attribute ", name, " is missing");
    read_.insert(name);
    const T* value = std::get_if<T>(&found->second);
    TORCH_CHECK(value != nullptr, "the attribute ", name, " has an unexpected type");
    return *value;
}

template <class T>
T Operands::either(const char* name, T otherwise) const {
    return attributes_.count(name) != 0 ? required<T>(name) : otherwise;
}

template int64_t Operands::required(const char*) const;
template int64_t Operands::either(const char*, int64_t) const;
template double Operands::either(const char*, double) const;
template std::string Operands::either(const char*, std::string) const;
template Ints Operands::either(const char*, Ints) const;

ScalarType Operands::dtype(const char* name, ScalarType otherwise) const {
    return attributes_.count(name) != 0 ? dtype(name) : otherwise;
}

bool Operands::compiling() const {
    for (const Input& input : inputs_) {
        if (input.tensor.defined() && input.tensor.is_meta()) return true;
    }
    return false;
}

std::vector<std::string> Operands::unread_attributes() const {
    std::vector<std::string> names;
    for (const auto& [name, value] : attributes_) {
        if (read_.count(name) == 0) names.push_back(name);
    }
    return names;
}

Tensor shaped_by_all(const std::vector<Tensor>& operands, ScalarType dtype) {
    Ints sizes;
    for (const Tensor& operand : operands) sizes = at::infer_size(sizes, operand.sizes());
    return shaped(sizes, dtype);
}

ScalarType dtype_of(const Result& result, const Operands& operands) {
    if (result.dtype) return *result.dtype;
    if (result.value.scalar_type() == at::kFloat) {
        for (size_t i = 0; i < operands.size(); ++i) {
            if (operands[i].defined() && operands[i].is_floating_point()) {
                return is_16_bit_float(operands[i]) ? operands[i].scalar_type() : at::kFloat;
            }
        }
    }
    return result.value.scalar_type();
}

void write(const Operation& operation, const Result& result, const TensorArgument& target) {
    const auto write_to = operation.kind == Kind::kComputes ? put : move;
    if (!is_private(target.format)) {
        write_to(target.read(), result.value);
        return;
    }
    const Tensor rounded = at::empty(target.sizes, target.dtype);
    write_to(rounded, result.value);
    store(rounded, target);
}

}  // namespace cann::graph
