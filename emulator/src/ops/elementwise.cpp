// Element by element: ATen computes 16-bit operands in float32 and rounds once, as the chip does.
#include "ops/operator.h"

// Integers enter functions that have no integer result as float32, as in torch.
#define UNARY(NAME, F) BOTH(NAME, (Tensor self), F(self))
UNARY(Acos, at::acos)
UNARY(Acosh, at::acosh)
UNARY(Asin, at::asin)
UNARY(Asinh, at::asinh)
UNARY(Atan, at::atan)
UNARY(Atanh, at::atanh)
UNARY(Ceil, at::ceil)
UNARY(Cos, at::cos)
UNARY(Cosh, at::cosh)
UNARY(Erf, at::erf)
UNARY(Erfc, at::erfc)
UNARY(Erfinv, at::erfinv)
UNARY(Exp, at::exp)
UNARY(Exp2, at::exp2)
UNARY(Expm1, at::expm1)
UNARY(Floor, at::floor)
UNARY(Frac, at::frac)
UNARY(Log, at::log)
UNARY(Log10, at::log10)
UNARY(Log1p, at::log1p)
UNARY(Log2, at::log2)
UNARY(LogicalNot, at::logical_not)
UNARY(Reciprocal, at::reciprocal)
UNARY(Relu, at::relu)
UNARY(Rsqrt, at::rsqrt)
UNARY(Sigmoid, at::sigmoid)
UNARY(Sin, at::sin)
UNARY(Sinc, at::sinc)
UNARY(Sinh, at::sinh)
UNARY(Sqrt, at::sqrt)
UNARY(Tan, at::tan)
UNARY(Tanh, at::tanh)
// torch_npu has no in-place call for these.
FUNCTION(Abs, (Tensor self), at::abs(self))
FUNCTION(BitwiseNot, (Tensor self), at::bitwise_not(self))
FUNCTION(Neg, (Tensor self), at::neg(self))
UNARY(Round, at::round)
FUNCTION(Sign, (Tensor self), at::sgn(self))  // of a complex number its direction
FUNCTION(Silu, (Tensor self), at::silu(self))
UNARY(Trunc, at::trunc)
FUNCTION(IsFinite, (Tensor self), at::isfinite(self))
FUNCTION(IsNegInf, (Tensor self), at::isneginf(self))
FUNCTION(IsPosInf, (Tensor self), at::isposinf(self))
FUNCTION(AngleV2, (Tensor self), at::angle(self))
BOTH(RoundDecimals, (Tensor self, int64_t decimals), at::round(self, decimals))
BOTH(NanToNum, (Tensor self, float nan, float posinf, float neginf), at::nan_to_num(self, nan, posinf, neginf))

BOTH(Add, (Tensor self, Tensor other, Scalar alpha), at::add(self, other, alpha))
BOTH(Adds, (Tensor self, Scalar other, Scalar alpha), at::add(self, other, alpha))
FUNCTION(AddV3, (Scalar self, Tensor other, Scalar alpha), at::add(at::scalar_tensor(self, other.options()), other, alpha))
BOTH(Sub, (Tensor self, Tensor other, Scalar alpha), at::sub(self, other, alpha))
BOTH(Subs, (Tensor self, Scalar other, Scalar alpha), at::sub(self, other, alpha))
FUNCTION(Rsub, (Tensor self, Tensor other, Scalar alpha), at::rsub(self, other, alpha))
FUNCTION(Rsubs, (Tensor self, Scalar other, Scalar alpha), at::rsub(self, other, alpha))
BOTH(Mul, (Tensor self, Tensor other), at::mul(self, other))
BOTH(Muls, (Tensor self, Scalar other), at::mul(self, other))
BOTH(Div, (Tensor self, Tensor other), at::div(self, other))
BOTH(Divs, (Tensor self, Scalar other), at::div(self, other))
BOTH(FloorDivide, (Tensor self, Tensor other), at::floor_divide(self, other))
BOTH(FloorDivides, (Tensor self, Scalar other), at::floor_divide(self, other))
BOTH(FmodTensor, (Tensor self, Tensor other), at::fmod(self, other))
BOTH(FmodScalar, (Tensor self, Scalar other), at::fmod(self, other))
BOTH(RemainderTensorTensor, (Tensor self, Tensor other), at::remainder(self, other))
BOTH(RemainderTensorScalar, (Tensor self, Scalar other), at::remainder(self, other))
FUNCTION(RemainderScalarTensor, (Scalar self, Tensor other), at::remainder(self, other))
BOTH(Addcmul, (Tensor self, Tensor tensor1, Tensor tensor2, Scalar value), at::addcmul(self, tensor1, tensor2, value))
BOTH(Addcdiv, (Tensor self, Tensor tensor1, Tensor tensor2, Scalar value), at::addcdiv(self, tensor1, tensor2, value))
BOTH(Atan2, (Tensor self, Tensor other), at::atan2(self, other))
BOTH(PowTensorTensor, (Tensor self, Tensor exponent), at::pow(self, exponent))
BOTH(PowTensorScalar, (Tensor self, Scalar exponent), at::pow(self, exponent))
FUNCTION(PowScalarTensor, (Scalar self, Tensor exponent), at::pow(self, exponent))
FUNCTION(Maximum, (Tensor self, Tensor other), at::maximum(self, other))
FUNCTION(Minimum, (Tensor self, Tensor other), at::minimum(self, other))
BOTH(Lerp, (Tensor self, Tensor end, Tensor weight), at::lerp(self, end, weight))
BOTH(Lerps, (Tensor self, Tensor end, Scalar weight), at::lerp(self, end, weight))
FUNCTION(Complex, (Tensor real, Tensor imag), at::complex(real, imag))
FUNCTION(Polar, (Tensor input, Tensor angle), at::polar(input, angle))

// The rounding that torch_npu passes as a number.
namespace cann {
static std::optional<std::string_view> rounding(int mode) {
    constexpr int kTrunc = 1, kFloor = 2;
    if (mode == kTrunc) return "trunc";
    if (mode == kFloor) return "floor";
    return std::nullopt;
}
}  // namespace cann
BOTH(DivMod, (Tensor self, Tensor other, int mode), at::div(self, other, rounding(mode)))
BOTH(DivMods, (Tensor self, Scalar other, int mode), at::div(self, other, rounding(mode)))

#define COMPARISON(NAME, F)                                       \
    BOTH(NAME##Tensor, (Tensor self, Tensor other), F(self, other)) \
    BOTH(NAME##Scalar, (Tensor self, Scalar other), F(self, other))
COMPARISON(Eq, at::eq)
COMPARISON(Ne, at::ne)
COMPARISON(Lt, at::lt)
COMPARISON(Le, at::le)
COMPARISON(Gt, at::gt)
COMPARISON(Ge, at::ge)
COMPARISON(BitwiseAnd, at::bitwise_and)
COMPARISON(BitwiseXor, at::bitwise_xor)
FUNCTION(BitwiseOrTensor, (Tensor self, Tensor other), at::bitwise_or(self, other))
FUNCTION(BitwiseOrScalar, (Tensor self, Scalar other), at::bitwise_or(self, other))
BOTH(LogicalAnd, (Tensor self, Tensor other), at::logical_and(self, other))
BOTH(LogicalOr, (Tensor self, Tensor other), at::logical_or(self, other))
FUNCTION(LogicalXor, (Tensor self, Tensor other), at::logical_xor(self, other))
FUNCTION(Equal, (Tensor self, Tensor other), at::scalar_tensor(at::equal(self, other), at::kBool))
FUNCTION(IsClose, (Tensor self, Tensor other, double rtol, double atol, bool equal_nan),
         at::isclose(up(self), up(other), rtol, atol, equal_nan))
FUNCTION(LeftShift, (Tensor self, Tensor shift_bits), at::bitwise_left_shift(self, shift_bits))
FUNCTION(LeftShifts, (Tensor self, Scalar shift_bits), at::bitwise_left_shift(self, shift_bits))
FUNCTION(RightShift, (Tensor input, Tensor shift_bits), at::bitwise_right_shift(input, shift_bits))

FUNCTION(Clamp, (Tensor self, MaybeScalar min, MaybeScalar max), at::clamp(self, min, max))
FUNCTION(ClampMin, (Tensor self, Scalar min), at::clamp_min(self, min))
BOTH(ClampMax, (Tensor self, Scalar max), at::clamp_max(self, max))
BOTH(ClampMinTensor, (Tensor self, Tensor min), at::clamp_min(self, min))
BOTH(ClampMaxTensor, (Tensor self, Tensor max), at::clamp_max(self, max))
FUNCTION(ClampTensor, (Tensor self, Tensor min, Tensor max),
         at::clamp(self, min.defined() ? std::optional(min) : std::nullopt, max.defined() ? std::optional(max) : std::nullopt))
FUNCTION(SWhere, (Tensor condition, Tensor self, Tensor other), at::where(condition.to(at::kBool), self, other))

ACLNN(Cast, (Tensor self, ScalarType dtype, OutTensor out) { put(out, self.to(dtype == at::kHalf ? at::kFloat : dtype)); })
ACLNN(InplaceCopy, (OutTensor self, Tensor src) {
    const Tensor whole = src.expand(self.sizes());
    if (self.scalar_type() == src.scalar_type()) move(self, whole);
    else put(self, whole);
})
