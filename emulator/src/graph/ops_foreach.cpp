// Lists of tensors: each operator is one of elements, applied to every tensor of its lists. There are as many results
// as tensors in a list; numbers follow the lists, as one for all tensors or as one for each.
#include "graph/operation.h"

namespace cann::graph {
namespace {

// The tensors of one result (undefined where there are fewer lists), and its number.
struct Item {
    Tensor a, b, c, number;
};

// Without dimensions, for a number does not raise the dtype of a list.
Tensor number_of(const Tensor& numbers, size_t index) {
    if (!numbers.defined()) return {};
    return numbers.numel() == 1 ? numbers.reshape({}) : numbers.flatten()[static_cast<int64_t>(index)];
}

Results each(const Operands& x, size_t first, size_t lists, size_t numbers, Tensor (*compute)(const Item&)) {
    Results results;
    for (size_t i = 0; i < x.outputs; ++i) {
        const auto member = [&](size_t list) { return list < lists ? x.up(first + list * x.outputs + i) : Tensor(); };
        const Item item{member(0), member(1), member(2), number_of(x.up(numbers), i)};
        results.push_back(as(x[first + i].scalar_type(), compute(item)));
    }
    return results;
}

Results each(const Operands& x, size_t lists, Tensor (*compute)(const Item&)) {
    return each(x, 0, lists, lists * x.outputs, compute);
}

Tensor norm(const Tensor& x, const Tensor& order) {
    const double p = order.is_meta() ? 2 : order.item<double>();
    return at::linalg_vector_norm(x.flatten(), p, at::IntArrayRef{0}, /*keepdim=*/true);
}

// 0.5 goes away from 0, as the chip's mode has it; torch's goes to the even number.
Tensor rounded_away(const Tensor& x) {
    return at::where(at::abs(at::frac(x)) == 0.5, at::trunc(x) + at::sign(x), at::round(x));
}

Tensor rounded(const Tensor& x, int64_t mode) {
    switch (mode) {
        case 1: return at::round(x);
        case 2: return at::floor(x);
        case 3: return at::ceil(x);
        case 4: return rounded_away(x);
        case 5: return at::trunc(x);
        case 7: return at::frac(x);
        default: TORCH_CHECK(false, "the rounding mode ", mode, " is not emulated");
    }
}

Results rounded(const Operands& x) {
    const int64_t mode = x.ints(x.outputs).at(0);
    Results results;
    for (size_t i = 0; i < x.outputs; ++i) results.push_back(as(x[i].scalar_type(), rounded(x.up(i), mode)));
    return results;
}

}  // namespace
}  // namespace cann::graph

#define FOREACH(NAME, LISTS, ...) \
    GE(Foreach##NAME, each(x, LISTS, [](const Item& i) -> Tensor { return __VA_ARGS__; }))
#define FOREACH_NUMBER(NAME, LISTS, ...)   \
    FOREACH(NAME##Scalar, LISTS, __VA_ARGS__) \
    FOREACH(NAME##ScalarList, LISTS, __VA_ARGS__)

FOREACH(Abs, 1, at::abs(i.a))
FOREACH(Acos, 1, at::acos(i.a))
FOREACH(Asin, 1, at::asin(i.a))
FOREACH(Atan, 1, at::atan(i.a))
FOREACH(Cos, 1, at::cos(i.a))
FOREACH(Cosh, 1, at::cosh(i.a))
FOREACH(Erf, 1, at::erf(i.a))
FOREACH(Erfc, 1, at::erfc(i.a))
FOREACH(Exp, 1, at::exp(i.a))
FOREACH(Expm1, 1, at::expm1(i.a))
FOREACH(Log, 1, at::log(i.a))
FOREACH(Log10, 1, at::log10(i.a))
FOREACH(Log1p, 1, at::log1p(i.a))
FOREACH(Log2, 1, at::log2(i.a))
FOREACH(Neg, 1, at::neg(i.a))
FOREACH(Reciprocal, 1, at::reciprocal(i.a))
FOREACH(Sigmoid, 1, at::sigmoid(i.a))
FOREACH(Sin, 1, at::sin(i.a))
FOREACH(Sinh, 1, at::sinh(i.a))
FOREACH(Sqrt, 1, at::sqrt(i.a))
FOREACH(Tan, 1, at::tan(i.a))
FOREACH(Tanh, 1, at::tanh(i.a))
FOREACH(Norm, 1, norm(i.a, i.number))
GE(ForeachRoundOffNumber, rounded(x))

FOREACH_NUMBER(Add, 1, i.a + i.number)
FOREACH_NUMBER(Sub, 1, i.a - i.number)
FOREACH_NUMBER(Mul, 1, i.a * i.number)
FOREACH_NUMBER(Div, 1, i.a / i.number)
FOREACH_NUMBER(Pow, 1, at::pow(i.a, i.number))
FOREACH_NUMBER(Maximum, 1, at::maximum(i.a, i.number))
FOREACH_NUMBER(Minimum, 1, at::minimum(i.a, i.number))
GE(ForeachPowScalarAndTensor, each(x, 1, 1, 0, [](const Item& i) { return at::pow(i.number, i.a); }))

FOREACH(AddList, 2, i.a + i.b * i.number)
FOREACH(SubList, 2, i.a - i.b * i.number)
FOREACH(MulList, 2, i.a * i.b)
FOREACH(DivList, 2, i.a / i.b)
FOREACH(PowList, 2, at::pow(i.a, i.b))
FOREACH(MaximumList, 2, at::maximum(i.a, i.b))
FOREACH(MinimumList, 2, at::minimum(i.a, i.b))
FOREACH(LerpScalar, 2, i.a + i.number * (i.b - i.a))
FOREACH(LerpList, 3, i.a + i.c * (i.b - i.a))
FOREACH_NUMBER(Addcdiv, 3, i.a + i.b / i.c * i.number)
FOREACH(AddcdivList, 3, i.a + i.b / i.c * i.number)
FOREACH_NUMBER(Addcmul, 3, i.a + i.b * i.c * i.number)
FOREACH(AddcmulList, 3, i.a + i.b * i.c * i.number)
