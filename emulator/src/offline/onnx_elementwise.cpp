// Element by element: arithmetic, comparisons, functions, activations.
#include <limits>

#include "offline/onnx_operator.h"
#include "ops/tensor.h"

namespace cann::offline {
namespace {

void unary(Translation& x, const char* type) { x.last(type, {{"x", x[0]}}); }
void binary(Translation& x, const char* type) { x.last(type, {{"x1", x[0]}, {"x2", x[1]}}); }

// A chain of operators of two operands; one alone is passed on.
void variadic(Translation& x, const char* type) {
    if (x.inputs() == 1) return x.last("Identity", {{"x", x[0]}});
    Source result = x[0];
    for (size_t i = 1; i + 1 < x.inputs(); ++i) result = x.add(type, {{"x1", result}, {"x2", x[i]}});
    x.last(type, {{"x1", result}, {"x2", x[x.inputs() - 1]}});
}

void remainder(Translation& x) {
    x.last("Mod", {{"x1", x[0]}, {"x2", x[1]}}, {{"_onnx_sign_of_second", int64_t{x.integer("fmod", 0) == 0}}});
}

void cast(Translation& x) {
    const int64_t number = x.integer("to", 0);
    const auto dtype = dtype_of_onnx(number);
    if (!dtype) x.refuse("a cast to ONNX's data type " + std::to_string(number) + " is not emulated");
    x.last("Cast", {{"x", x[0]}}, {{"dst_type", int64_t{to_acl(*dtype)}}});
}

// Both bounds, or one as an extreme.
void clip(Translation& x) {
    if (x.has(1) && x.has(2)) {
        x.last("ClipByValue", {{"x", x[0]}, {"clip_value_min", x[1]}, {"clip_value_max", x[2]}});
    } else if (x.has(1)) {
        x.last("Maximum", {{"x1", x[0]}, {"x2", x[1]}});
    } else if (x.has(2)) {
        x.last("Minimum", {{"x1", x[0]}, {"x2", x[2]}});
    } else {
        x.refuse("E11010", "CANN takes no Clip without bounds");
    }
}

// Its bounds are float32, and so is the result, whatever the operand.
void clip_of_attributes(Translation& x) {
    constexpr double kLargest = std::numeric_limits<float>::max();
    const auto bound = [&](const char* name, double otherwise) {
        return x.constant(at::scalar_tensor(x.real(name, otherwise), at::kFloat));
    };
    const Source wide = x.add("Cast", {{"x", x[0]}}, {{"dst_type", int64_t{ACL_FLOAT}}});
    x.last("ClipByValue", {{"x", wide}, {"clip_value_min", bound("min", -kLargest)},
                           {"clip_value_max", bound("max", kLargest)}});
}

void is_infinite(Translation& x) {
    const bool both = x.integer("detect_negative", 1) != 0 && x.integer("detect_positive", 1) != 0;
    if (!both) x.refuse("CANN finds infinities of both signs only");
    unary(x, "IsInf");
}

void exclusive_or(Translation& x) {
    const auto number = [&](size_t input) { return x.add("Cast", {{"x", x[input]}}, {{"dst_type", int64_t{ACL_INT32}}}); };
    const Source bits = x.add("BitwiseXor", {{"x1", number(0)}, {"x2", number(1)}});
    x.last("Cast", {{"x", bits}}, {{"dst_type", int64_t{ACL_BOOL}}});
}

// The mask that a later release makes beside the result is not there.
void dropout(Translation& x) {
    const auto training = x.known(2);
    if (x.has(2) && (!training || training->item<bool>())) x.refuse("a Dropout that trains is not emulated");
    if (x.outputs() > 1) x.refuse("the mask of a Dropout is not emulated");
    x.real("ratio", 0.5);
    x.integer("seed", 0);
    x.last("Identity", {{"x", x[0]}});
}

}  // namespace
}  // namespace cann::offline

ONNX(Abs, 8, 18, unary(x, "Abs"))
ONNX(Acos, 8, 18, unary(x, "Acos"))
ONNX(Acosh, 8, 18, unary(x, "Acosh"))
ONNX(Asin, 8, 18, unary(x, "Asin"))
ONNX(Asinh, 8, 18, unary(x, "Asinh"))
ONNX(Atan, 8, 18, unary(x, "Atan"))
ONNX(Atanh, 8, 18, unary(x, "Atanh"))
ONNX(Ceil, 8, 18, unary(x, "Ceil"))
ONNX(Cos, 8, 18, unary(x, "Cos"))
ONNX(Cosh, 8, 18, unary(x, "Cosh"))
ONNX(Erf, 8, 18, unary(x, "Erf"))
ONNX(Exp, 8, 18, unary(x, "Exp"))
ONNX(Floor, 8, 18, unary(x, "Floor"))
ONNX(Log, 8, 18, unary(x, "Log"))
ONNX(Neg, 8, 18, unary(x, "Neg"))
ONNX(Reciprocal, 8, 18, unary(x, "Reciprocal"))
ONNX(Round, 8, 18, unary(x, "Round"))
ONNX(Sign, 8, 18, unary(x, "Sign"))
ONNX(Sin, 8, 18, unary(x, "Sin"))
ONNX(Sinh, 8, 18, unary(x, "Sinh"))
ONNX(Sqrt, 8, 18, unary(x, "Sqrt"))
ONNX(Tan, 8, 18, unary(x, "Tan"))
ONNX(Tanh, 8, 18, unary(x, "Tanh"))
ONNX(Not, 8, 18, unary(x, "LogicalNot"))
ONNX(IsNaN, 9, 18, unary(x, "IsNan"))
ONNX(IsInf, 10, 18, is_infinite(x))
ONNX(BitwiseNot, 18, 18, unary(x, "Invert"))
ONNX(Identity, 8, 18, unary(x, "Identity"))
ONNX(If, 8, 18, x.refuse("a graph within a node is not emulated"))
ONNX(Dropout, 8, 18, dropout(x))

ONNX(Add, 8, 18, binary(x, "Add"))
ONNX(Sub, 8, 18, binary(x, "Sub"))
ONNX(Mul, 8, 18, binary(x, "Mul"))
ONNX(Div, 8, 18, binary(x, "RealDiv"))
ONNX(Mod, 10, 18, remainder(x))
ONNX(Pow, 8, 18, binary(x, "Pow"))
ONNX(Max, 8, 18, variadic(x, "Maximum"))
ONNX(Min, 8, 18, variadic(x, "Minimum"))
ONNX(Equal, 8, 18, binary(x, "Equal"))
ONNX(Less, 8, 18, binary(x, "Less"))
ONNX(LessOrEqual, 8, 18, binary(x, "LessEqual"))
ONNX(Greater, 8, 18, binary(x, "Greater"))
ONNX(GreaterOrEqual, 8, 8, binary(x, "GreaterEqual"))
ONNX(GreaterOrEqual, 12, 18, binary(x, "GreaterEqual"))
ONNX(And, 8, 18, binary(x, "LogicalAnd"))
ONNX(Or, 8, 18, binary(x, "LogicalOr"))
ONNX(Xor, 8, 18, exclusive_or(x))
ONNX(BitwiseAnd, 18, 18, binary(x, "BitwiseAnd"))
ONNX(BitwiseOr, 18, 18, binary(x, "BitwiseOr"))
ONNX(BitwiseXor, 18, 18, binary(x, "BitwiseXor"))
ONNX(Where, 8, 18, x.last("SelectV2", {{"condition", x[0]}, {"then", x[1]}, {"else", x[2]}}))
ONNX(Cast, 8, 18, cast(x))
ONNX(Clip, 8, 10, clip_of_attributes(x))
ONNX(Clip, 11, 18, clip(x))

ONNX(Relu, 8, 18, unary(x, "Relu"))
ONNX(Sigmoid, 8, 18, unary(x, "Sigmoid"))
ONNX(Softplus, 8, 18, unary(x, "Softplus"))
ONNX(HardSwish, 14, 18, unary(x, "HardSwish"))
ONNX(Mish, 18, 18, unary(x, "Mish"))
ONNX(Elu, 8, 18, x.last("Elu", {{"x", x[0]}}, {{"alpha", x.real("alpha", 1)}}))
ONNX(LeakyRelu, 8, 18, x.last("LeakyRelu", {{"x", x[0]}}, {{"negative_slope", x.real("alpha", 0.01)}}))
ONNX(HardSigmoid, 8, 18,
     x.last("HardSigmoid", {{"input_x", x[0]}}, {{"alpha", x.real("alpha", 0.2)}, {"beta", x.real("beta", 0.5)}}))
