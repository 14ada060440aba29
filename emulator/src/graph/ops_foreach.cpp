// Lists of tensors: each operator is one of elements, applied to every tensor of its lists (ops/foreach.h). There are as
// many results as tensors in a list; numbers follow the lists, as one for all tensors or as one for each.
#include "ops/foreach.h"

#include "graph/operation.h"

namespace cann::graph {
namespace {

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

Results rounded(const Operands& x) {
    const int64_t mode = x.ints(x.outputs).at(0);
    Results results;
    for (size_t i = 0; i < x.outputs; ++i) results.push_back(as(x[i].scalar_type(), cann::rounded(x.up(i), mode)));
    return results;
}

}  // namespace
}  // namespace cann::graph

#define FOREACH(NAME, LISTS, ...) \
    GE(Foreach##NAME, each(x, LISTS, [](const Item& i) -> Tensor { return __VA_ARGS__; }))
#define ONE(NAME, ...) FOREACH(NAME, 1, __VA_ARGS__)
#define ONE_AND_A_NUMBER(NAME, ...)           \
    FOREACH(NAME##Scalar, 1, __VA_ARGS__)     \
    FOREACH(NAME##ScalarList, 1, __VA_ARGS__)
#define TWO(NAME, ...) FOREACH(NAME##List, 2, __VA_ARGS__)
#define THREE(NAME, ...)                      \
    FOREACH(NAME##Scalar, 3, __VA_ARGS__)     \
    FOREACH(NAME##ScalarList, 3, __VA_ARGS__) \
    FOREACH(NAME##List, 3, __VA_ARGS__)
FOREACH_OF_ONE(ONE)
FOREACH_OF_ONE_AND_A_NUMBER(ONE_AND_A_NUMBER)
FOREACH_OF_TWO(TWO)
FOREACH_OF_TWO_SCALED(TWO)
FOREACH_OF_THREE(THREE)
FOREACH(LerpScalar, 2, i.a + i.number * (i.b - i.a))
FOREACH(LerpList, 3, i.a + i.c * (i.b - i.a))
FOREACH(Norm, 1, norm(i.a, i.number))
GE(ForeachPowScalarAndTensor, each(x, 1, 1, 0, [](const Item& i) { return at::pow(i.number, i.a); }))
GE(ForeachRoundOffNumber, rounded(x))
