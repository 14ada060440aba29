// What the operators on lists of tensors compute for each place in their lists, of compiled graphs (graph/ops_foreach.cpp)
// and of eager calls (ops/foreach.cpp) alike: X(NAME, EXPRESSION), where `i` is the Item of that place.
#pragma once

#include <ATen/ATen.h>

namespace cann {

// The tensors of one place, 16 bits as float32 (undefined where there are fewer lists), and the number that goes with it.
struct Item {
    at::Tensor a, b, c, number;
};

// The rounding that torch_npu asks for by a number.
at::Tensor rounded(const at::Tensor& x, int64_t mode);

}  // namespace cann

#define FOREACH_OF_ONE(X)            \
    X(Abs, at::abs(i.a))             \
    X(Acos, at::acos(i.a))           \
    X(Asin, at::asin(i.a))           \
    X(Atan, at::atan(i.a))           \
    X(Cos, at::cos(i.a))             \
    X(Cosh, at::cosh(i.a))           \
    X(Erf, at::erf(i.a))             \
    X(Erfc, at::erfc(i.a))           \
    X(Exp, at::exp(i.a))             \
    X(Expm1, at::expm1(i.a))         \
    X(Log, at::log(i.a))             \
    X(Log10, at::log10(i.a))         \
    X(Log1p, at::log1p(i.a))         \
    X(Log2, at::log2(i.a))           \
    X(Neg, at::neg(i.a))             \
    X(Reciprocal, at::reciprocal(i.a)) \
    X(Sigmoid, at::sigmoid(i.a))     \
    X(Sign, at::sign(i.a))           \
    X(Sin, at::sin(i.a))             \
    X(Sinh, at::sinh(i.a))           \
    X(Sqrt, at::sqrt(i.a))           \
    X(Tan, at::tan(i.a))             \
    X(Tanh, at::tanh(i.a))
#define FOREACH_OF_ONE_AND_A_NUMBER(X)          \
    X(Add, i.a + i.number)                      \
    X(Sub, i.a - i.number)                      \
    X(Mul, i.a * i.number)                      \
    X(Div, i.a / i.number)                      \
    X(Pow, at::pow(i.a, i.number))              \
    X(Maximum, at::maximum(i.a, i.number))      \
    X(Minimum, at::minimum(i.a, i.number))
#define FOREACH_OF_TWO(X)                  \
    X(Mul, i.a * i.b)                      \
    X(Div, i.a / i.b)                      \
    X(Pow, at::pow(i.a, i.b))              \
    X(Maximum, at::maximum(i.a, i.b))      \
    X(Minimum, at::minimum(i.a, i.b))
#define FOREACH_OF_TWO_SCALED(X)     \
    X(Add, i.a + i.b * i.number)     \
    X(Sub, i.a - i.b * i.number)
#define FOREACH_OF_THREE(X)                  \
    X(Addcdiv, i.a + i.b / i.c * i.number)   \
    X(Addcmul, i.a + i.b * i.c * i.number)
