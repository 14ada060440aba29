// Element by element: arithmetic, comparisons, functions, activations.
#include "graph/shapes.h"
#include "ops/shared.h"

namespace cann::graph {
namespace {

// Whole numbers stay whole, rounded towards zero or downwards.
Tensor divided(const Tensor& a, const Tensor& b, const char* rounding) {
    return at::isIntegralType(a.scalar_type(), true) ? at::div(a, b, rounding) : at::div(a, b);
}

// ln(shift + scale * x) / ln(base), where a base of -1 stands for e.
Tensor logarithm(const Operands& x) {
    const double base = x.real("base", -1), scale = x.real("scale", 1), shift = x.real("shift", 0);
    const Tensor natural = at::log(scale == 1 && shift == 0 ? x.up(0) : x.up(0) * scale + shift);
    return base > 0 ? natural / std::log(base) : natural;
}

Tensor power(const Operands& x) {
    const double base = x.real("base", -1), scale = x.real("scale", 1), shift = x.real("shift", 0);
    const Tensor exponent = scale == 1 && shift == 0 ? x.up(0) : x.up(0) * scale + shift;
    return at::exp(base > 0 ? exponent * std::log(base) : exponent);
}

Tensor thresholded(const Operands& x) {
    const Tensor value = x[2].defined() ? x[2].to(x[0].scalar_type()) : at::zeros_like(x[0]);
    if (x.compiling()) return shaped_by_all({x[0], x[1], value}, x[0].scalar_type());
    return at::where(x[0] <= x[1], value, x[0]);  // NaN stays
}

Tensor chosen(const Operands& x, const Tensor& condition, const Tensor& left, const Tensor& right) {
    if (x.compiling()) return shaped_by_all({condition, left, right}, at::result_type(left, right));
    return at::where(condition, left, right);
}

Tensor one_hot(const Operands& x) {
    const Tensor classes = at::arange(x.integer("depth"), x[0].options());
    const Tensor hot = at::eq(x[0].unsqueeze(-1), classes).movedim(-1, x.integer("axis", -1));
    return chosen(x, hot, x[1], x[2]);
}

Tensor masked(const Operands& x) {
    if (x.compiling()) return shaped_by_all({x[0], x[1], x[2]}, x[0].scalar_type());
    return at::where(x[1], x[2].to(x[0].scalar_type()), x[0]);
}

Tensor asked(const Operands& x, Tensor (*question)(const Tensor&)) {
    return x.compiling() ? shaped_by_all({x[0]}, at::kBool) : question(x[0]);
}

Tensor combined(const Operands& x, Tensor (*rule)(const Tensor&, const Tensor&)) {
    return x.compiling() ? shaped_by_all({x[0], x[1]}, at::kBool) : rule(x[0], x[1]);
}

Tensor swish(const Operands& x) { return x.up(0) * at::sigmoid(x.up(0) * x.real("scale", 1)); }

Tensor clipped(const Operands& x) { return at::minimum(at::maximum(x.up(0), x.up(1)), x.up(2)); }

// Whole numbers have no exponents that are fractions, and ONNX keeps the dtype of what is raised.
Tensor raised(const Operands& x) {
    const bool mixed = at::isIntegralType(x[0].scalar_type(), true) && x[1].is_floating_point();
    TORCH_CHECK(!mixed, "a power of whole numbers with exponents that are none is not emulated");
    return at::pow(x.up(0), x.up(1));
}

// Has the sign of the first operand. A model of ONNX may mean that of the second, which CANN's parser does not read.
Tensor remainder(const Operands& x) {
    const Tensor left = x.up(0), right = x.up(1), value = at::fmod(left, right);
    const bool of_second = x.flag("_onnx_sign_of_second") && !x.compiling();
    TORCH_CHECK(!of_second || at::equal(value, at::remainder(left, right)),
                "the model's Mod means another sign (fmod=0), but CANN's parser does not read fmod");
    return value;
}

Tensor finite(const Operands& x) {
    const double nan = x.real("nan", 0), highest = x.real("posinf", 0), lowest = x.real("neginf", 0);
    return x.compiling() ? x.up(0) : at::nan_to_num(x.up(0), nan, highest, lowest);
}

const char* gelu_form(const std::string& approximate) { return approximate == "tanh" ? "tanh" : "none"; }

}  // namespace
}  // namespace cann::graph

GE(Add, x.up(0) + x.up(1))
GE(Sub, x.up(0) - x.up(1))
GE(Mul, x.up(0) * x.up(1))
GE(Muls, x.up(0) * x.real("value", 1))
GE(Adds, x.up(0) + x.real("value", 0))
GE(RealDiv, divided(x.up(0), x.up(1), "trunc"))
GE(Div, divided(x.up(0), x.up(1), "trunc"))
GE(TruncateDiv, at::div(x.up(0), x.up(1), "trunc"))
GE(FloorDiv, at::div(x.up(0), x.up(1), "floor"))
GE(FloorMod, at::remainder(x.up(0), x.up(1)))
GE(Mod, remainder(x))
GE(AxpyV2, x.up(0) + x.up(1) * x.up(2))
GE(Axpy, x.up(0) + x.up(1) * x.real("alpha", 1))
GE(Sxpy, x.up(0) - (x[2].defined() ? x.up(1) * x.up(2) : x.up(1)))
GE(Addcmul, x.up(0) + x.up(1) * x.up(2) * x.up(3))
GE(Addcdiv, x.up(0) + x.up(1) / x.up(2) * x.up(3))
GE(Lerp, x.up(0) + x.up(2) * (x.up(1) - x.up(0)))
GE(Pow, raised(x))
GE(Maximum, at::maximum(x[0], x[1]))
GE(Minimum, at::minimum(x[0], x[1]))
GE(Atan2, at::atan2(x.up(0), x.up(1)))
GE(ClipByValue, clipped(x))
GE(ClipByValueV2, clipped(x))

GE(Abs, by_element(x[0], at::abs))
GE(Neg, at::neg(x[0]))
GE(Sign, at::sign(x[0]))
GE(Square, at::square(x.up(0)))
GE(Sqrt, at::sqrt(x.up(0)))
GE(Rsqrt, at::rsqrt(x.up(0)))
GE(Reciprocal, at::reciprocal(x.up(0)))
GE(Exp, power(x))
GE(Expm1, at::expm1(x.up(0)))
GE(Log, logarithm(x))
GE(Log1p, at::log1p(x.up(0)))
GE(Sin, at::sin(x.up(0)))
GE(Cos, at::cos(x.up(0)))
GE(Tan, at::tan(x.up(0)))
GE(Asin, at::asin(x.up(0)))
GE(Acos, at::acos(x.up(0)))
GE(Atan, at::atan(x.up(0)))
GE(Sinh, at::sinh(x.up(0)))
GE(Cosh, at::cosh(x.up(0)))
GE(Tanh, at::tanh(x.up(0)))
GE(Asinh, at::asinh(x.up(0)))
GE(Acosh, at::acosh(x.up(0)))
GE(Atanh, at::atanh(x.up(0)))
GE(Erf, at::erf(x.up(0)))
GE(Erfinv, at::erfinv(x.up(0)))
GE(Floor, at::floor(x[0]))
GE(Ceil, at::ceil(x[0]))
GE(Round, at::round(x[0], x.integer("decimals", 0)))
GE(Trunc, at::trunc(x[0]))

GE_MOVES(Equal, at::eq(x[0], x[1]))
GE_MOVES(NotEqual, at::ne(x[0], x[1]))
GE_MOVES(Less, at::lt(x[0], x[1]))
GE_MOVES(LessEqual, at::le(x[0], x[1]))
GE_MOVES(Greater, at::gt(x[0], x[1]))
GE_MOVES(GreaterEqual, at::ge(x[0], x[1]))
GE_MOVES(LogicalAnd, combined(x, at::logical_and))
GE_MOVES(LogicalOr, combined(x, at::logical_or))
GE_MOVES(LogicalNot, asked(x, at::logical_not))
GE_MOVES(IsInf, asked(x, at::isinf))
GE_MOVES(IsNan, asked(x, at::isnan))
GE_MOVES(IsFinite, asked(x, at::isfinite))
GE(BitwiseAnd, at::bitwise_and(x[0], x[1]))
GE(BitwiseOr, at::bitwise_or(x[0], x[1]))
GE(BitwiseXor, at::bitwise_xor(x[0], x[1]))
GE(Invert, at::bitwise_not(x[0]))
GE(LeftShift, at::bitwise_left_shift(x[0], x[1]))
GE(RightShift, at::bitwise_right_shift(x[0], x[1]))

GE(Cast, as(x.dtype("dst_type"), x[0]))
GE(NanToNum, finite(x))
GE_MOVES(SelectV2, chosen(x, x[0], x[1], x[2]))
GE_MOVES(Select, chosen(x, x[0], x[1], x[2]))
GE_MOVES(MaskedFill, masked(x))
GE_MOVES(OneHotD, one_hot(x))
GE_MOVES(ZerosLike, at::zeros_like(x[0]))
GE_MOVES(OnesLike, at::ones_like(x[0]))
GE_MOVES(TensorMove, x[0])
GE_VIEWS(Identity, x[0])
GE_ASSIGNS(Assign, (x.flag("validate_shape"), x.flag("use_locking"), x[1]))

// The chip's Gelu is the tanh form whatever torch was asked for.
GE(Gelu, at::gelu(x.up(0), "tanh"))
GE(GeluV2, at::gelu(x.up(0), gelu_form(x.text("approximate", "none"))))
GE(FastGelu, x.up(0) * at::sigmoid(x.up(0) * 1.702))
GE(FastGeluGrad, fast_gelu_backward(x.up(0), x.up(1)))
GE(Swish, swish(x))
GE(SwishGrad, at::silu_backward(x.up(0), x.up(1)))
GE(Sigmoid, at::sigmoid(x.up(0)))
GE(Relu, by_element(x[0], at::relu))
GE_MOVES(ThresholdV2, thresholded(x))
GE_MOVES(ThresholdV2D, at::threshold(x[0], x.real("threshold", 0), x.real("value", 0)))
GE(LeakyRelu, at::leaky_relu(x.up(0), x.real("negative_slope", 0)))
GE(Elu, at::elu(x.up(0), x.real("alpha", 1), x.real("scale", 1), x.real("input_scale", 1)))
GE(Softplus, at::softplus(x.up(0)))
GE(Mish, at::mish(x.up(0)))
GE(MishGrad, at::mish_backward(x.up(0), x.up(1)))
GE(LogSigmoid, by_element(x.up(0), at::log_sigmoid))
GE(HardSwish, by_element(x.up(0), at::hardswish))
GE(HardSigmoid, at::clamp(x.up(0) * x.real("alpha", 1. / 6) + x.real("beta", 0.5), 0, 1))
