// How to declare an operator. One line makes both C functions of aclnn's two-phase interface:
//
//     ACLNN(Add, (Tensor self, Tensor other, Scalar alpha, OutTensor out) { put(out, at::add(self, other, alpha)); })
//
// The types of the parameters are those of the C prototype (see Parameter below), their names are what the rules of
// the chip profiles and the lines of the trace refer to. A kernel gets CPU tensors over device memory.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/numerics.h"
#include "ops/tensor.h"

namespace cann {

class Stream;

using at::Scalar;
using at::ScalarType;
using at::Tensor;
using Ints = std::vector<int64_t>;
using MaybeInts = std::optional<std::vector<int64_t>>;
using MaybeScalar = std::optional<at::Scalar>;
using Scalars = std::vector<at::Scalar>;
using Tensors = std::vector<at::Tensor>;
using Bools = std::vector<bool>;
// A tensor that the kernel writes, whether it also reads it or not: the check for races must know.
struct OutTensor : at::Tensor {};
struct OutTensors : Tensors {};
// A tensor whose size only the kernel knows: it is allocated at its largest, and the kernel calls resize().
struct Resizable {
    std::shared_ptr<TensorArgument> argument;

    void set(const Tensor& value) const;
};
// A tensor as it is stored, for kernels that change formats.
struct Stored {
    std::shared_ptr<TensorArgument> argument;
};

// One argument of a call, for rules and the trace.
struct Argument {
    std::string name;
    std::vector<std::shared_ptr<TensorArgument>> tensors;
    std::string value;  // of numbers, strings and arrays
    bool stored = false;  // the kernel takes private formats by itself
    bool written = false;
};

struct Call {
    const char* operator_name;  // without "aclnn"
    std::vector<Argument> arguments;
    const char* graph = nullptr;  // the compiled graph that launches it

    std::string title() const;  // for messages

    const Argument* find(std::string_view name) const;
    const TensorArgument* tensor(std::string_view name) const;  // nullptr when absent
    int64_t number(std::string_view name, int64_t otherwise) const;
};

struct Executor {
    Call call;
    std::function<void()> run;
};

// The error code of a call that the chip refuses, 0 for one that it takes.
int refuse(const Call& call);
// The rule of the chip's profile that the call breaks.
struct BrokenRule {
    std::string parameter, text;
};
std::optional<BrokenRule> broken_rule(const Call& call);
// Runs the call in order on the stream, and deletes the executor.
int launch(Executor* executor, aclrtStream stream);
// Runs the call: within a task of the stream.
int run_now(const Executor& executor, const Stream& stream);
int fail_plan(const char* operator_name, const std::exception& error);
// Writes what a tensor means in the format in which it is stored.
void store(const Tensor& logical, const TensorArgument& target);
std::vector<std::string> parameter_names(const char* declaration);

// ---- from the C prototype to the kernel: `type` there, `hold` keeps it until the launch, `load` makes the kernel's ----
template <class T>
struct Parameter {
    using type = T;
    static T hold(T value) { return value; }
    static T load(T value) { return value; }
    static void describe(T value, Argument& argument) { argument.value = std::to_string(value); }
};

std::string to_text(at::IntArrayRef values);
std::string to_text(const at::Scalar& value);

template <>
struct Parameter<Tensor> {
    using type = const aclTensor*;
    using Held = std::shared_ptr<TensorArgument>;
    static Held hold(type tensor) { return tensor ? tensor->argument : nullptr; }
    static Tensor load(const Held& held) { return held ? held->read() : Tensor(); }
    static void describe(type tensor, Argument& argument) {
        if (tensor) argument.tensors.push_back(tensor->argument);
    }
};

template <class T>
struct WholeTensor {
    using type = const aclTensor*;
    static T hold(type tensor) { return {tensor->argument}; }
    static T load(const T& held) { return held; }
    static void describe(type tensor, Argument& argument) {
        argument.tensors.push_back(tensor->argument);
        argument.stored = true;
    }
};
template <>
struct Parameter<Resizable> : WholeTensor<Resizable> {
    static void describe(type tensor, Argument& argument) {
        WholeTensor<Resizable>::describe(tensor, argument);
        argument.written = true;
    }
};
template <>
struct Parameter<Stored> : WholeTensor<Stored> {};

template <>
struct Parameter<Tensors> {
    using type = const aclTensorList*;
    using Held = std::vector<std::shared_ptr<TensorArgument>>;
    static Held hold(type list) {
        Held held;
        if (list != nullptr) {
            for (const aclTensor* tensor : list->tensors) held.push_back(Parameter<Tensor>::hold(tensor));
        }
        return held;
    }
    static Tensors load(const Held& held) {
        Tensors tensors;
        for (const auto& tensor : held) tensors.push_back(Parameter<Tensor>::load(tensor));
        return tensors;
    }
    static void describe(type list, Argument& argument) {
        for (const auto& tensor : hold(list)) {
            if (tensor) argument.tensors.push_back(tensor);
        }
    }
};

// As Parameter<In>, of what is written.
template <class Out, class In>
struct Written : Parameter<In> {
    using Base = Parameter<In>;
    static Out load(const typename Base::Held& held) { return {Base::load(held)}; }
    static void describe(typename Base::type value, Argument& argument) {
        Base::describe(value, argument);
        argument.written = true;
    }
};
template <>
struct Parameter<OutTensor> : Written<OutTensor, Tensor> {};
template <>
struct Parameter<OutTensors> : Written<OutTensors, Tensors> {};

template <>
struct Parameter<MaybeScalar> {
    using type = const aclScalar*;
    static MaybeScalar hold(type scalar) { return scalar ? MaybeScalar(scalar->value) : std::nullopt; }
    static MaybeScalar load(const MaybeScalar& held) { return held; }
    static void describe(type scalar, Argument& argument) {
        if (scalar) argument.value = to_text(scalar->value);
    }
};
template <>
struct Parameter<Scalar> {
    using type = const aclScalar*;
    static Scalar hold(type scalar) {
        TORCH_CHECK(scalar != nullptr, "a scalar is missing");
        return scalar->value;
    }
    static Scalar load(const Scalar& held) { return held; }
    static void describe(type scalar, Argument& argument) { Parameter<MaybeScalar>::describe(scalar, argument); }
};

template <>
struct Parameter<Scalars> {
    using type = const aclScalarList*;
    static Scalars hold(type list) {
        Scalars values;
        for (const aclScalar* scalar : list->scalars) values.push_back(scalar->value);
        return values;
    }
    static Scalars load(const Scalars& held) { return held; }
    static void describe(type list, Argument& argument) {
        for (const Scalar& value : hold(list)) argument.value += (argument.value.empty() ? "" : ",") + to_text(value);
    }
};

template <>
struct Parameter<MaybeInts> {
    using type = const aclIntArray*;
    static MaybeInts hold(type array) { return array ? MaybeInts(array->values) : std::nullopt; }
    static MaybeInts load(const MaybeInts& held) { return held; }
    static void describe(type array, Argument& argument) {
        if (array) argument.value = to_text(array->values);
    }
};
template <>
struct Parameter<Ints> {
    using type = const aclIntArray*;
    static Ints hold(type array) { return array ? array->values : Ints(); }
    static Ints load(const Ints& held) { return held; }
    static void describe(type array, Argument& argument) { Parameter<MaybeInts>::describe(array, argument); }
};

template <>
struct Parameter<Bools> {
    using type = const aclBoolArray*;
    static Bools hold(type array) { return array ? array->values : Bools(); }
    static Bools load(const Bools& held) { return held; }
    static void describe(type array, Argument& argument) {
        if (array) argument.value = to_text(Ints(array->values.begin(), array->values.end()));
    }
};

template <>
struct Parameter<ScalarType> {
    using type = aclDataType;
    static ScalarType hold(type dtype) { return from_acl(dtype); }
    static ScalarType load(ScalarType held) { return held; }
    static void describe(type dtype, Argument& argument) { argument.value = dtype_name(from_acl(dtype)); }
};

template <>
struct Parameter<std::string> {
    using type = const char*;
    static std::string hold(type text) { return text ? text : ""; }
    static std::string load(const std::string& held) { return held; }
    static void describe(type text, Argument& argument) { argument.value = hold(text); }
};

template <auto Kernel>
struct Phases;

template <class... P, void (*Kernel)(P...)>
struct Phases<Kernel> {
    // aclnnXGetWorkspaceSize: checks the call and keeps its arguments, as torch_npu destroys its own after the launch.
    template <class Id>
    static int plan(typename Parameter<P>::type... arguments, uint64_t* workspace, Executor** executor) {
        try {
            static const std::vector<std::string> names = parameter_names(Id::declaration);
            auto planned = std::make_unique<Executor>();
            planned->call.operator_name = Id::name;
            size_t index = 0;
            (describe<P>(arguments, names[index++], planned->call), ...);
            if (const int code = refuse(planned->call)) return code;
            planned->run = [held = std::make_tuple(Parameter<P>::hold(arguments)...)] {
                std::apply([](const auto&... each) { Kernel(Parameter<P>::load(each)...); }, held);
            };
            *workspace = 0;
            *executor = planned.release();
            return 0;
        } catch (const std::exception& error) {
            return fail_plan(Id::name, error);
        }
    }

private:
    template <class T>
    static void describe(typename Parameter<T>::type value, const std::string& name, Call& call) {
        Argument argument;
        argument.name = name;
        Parameter<T>::describe(value, argument);
        call.arguments.push_back(std::move(argument));
    }
};

inline int execute(void*, uint64_t, Executor* executor, aclrtStream stream) { return launch(executor, stream); }

}  // namespace cann

// A parameter list that exists only as a template pack cannot be written as an extern "C" definition. An indirect
// function can carry it: dlsym calls the resolver and returns the instance of the template.
#define ACLNN(NAME, ...) ACLNN_EXPANDED(NAME, __VA_ARGS__)
#define ACLNN_EXPANDED(NAME, ...)                                                                             \
    namespace cann::op_##NAME {                                                                               \
    struct Id {                                                                                               \
        static constexpr const char* name = #NAME;                                                            \
        static constexpr const char* declaration = #__VA_ARGS__;                                              \
    };                                                                                                        \
    constexpr auto kernel = +[] __VA_ARGS__;                                                                  \
    extern "C" {                                                                                              \
    __attribute__((used)) static void* resolve_plan_##NAME() {                                                \
        return reinterpret_cast<void*>(&Phases<kernel>::plan<Id>);                                            \
    }                                                                                                         \
    __attribute__((used)) static void* resolve_run_##NAME() { return reinterpret_cast<void*>(&execute); }     \
    }                                                                                                         \
    }                                                                                                         \
    CANN_API __attribute__((ifunc("resolve_plan_" #NAME))) int aclnn##NAME##GetWorkspaceSize();               \
    CANN_API __attribute__((ifunc("resolve_run_" #NAME))) int aclnn##NAME();

// Families. PARAMETERS is in parentheses and starts with `Tensor self`; the last argument is the result.
#define STRIP(...) __VA_ARGS__
#define FIRST_IS_OUT(...) Out##__VA_ARGS__
#define FUNCTION(NAME, PARAMETERS, ...) ACLNN(NAME, (STRIP PARAMETERS, OutTensor out) { put(out, __VA_ARGS__); })
#define INPLACE(NAME, PARAMETERS, ...) ACLNN(Inplace##NAME, (FIRST_IS_OUT PARAMETERS) { put(self, __VA_ARGS__); })
// As out-of-place and in-place operators of torch: a result whose kind the output cannot hold is refused.
#define BOTH(NAME, PARAMETERS, ...)                                                            \
    ACLNN(NAME, (STRIP PARAMETERS, OutTensor out) { put_of_kind(out, __VA_ARGS__); })          \
    ACLNN(Inplace##NAME, (FIRST_IS_OUT PARAMETERS) { put_of_kind(self, __VA_ARGS__); })
