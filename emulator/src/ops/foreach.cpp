// Operators on lists of tensors, which optimisers call (foreach.h has what they compute).
#include "ops/foreach.h"

#include "ops/operator.h"

namespace cann {
namespace {

// A number of which the dtype does not count, as in torch.
Tensor number_of(const Scalar& value) {
    const Tensor number = at::scalar_tensor(value, at::device(at::kCPU).dtype(value.type()));
    number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return number;
}
Tensor number_at(const Scalar& value, size_t) { return number_of(value); }
Tensor number_at(const Scalars& values, size_t index) { return number_of(values.at(index)); }
Tensor number_at(const Tensor& values, size_t index) { return values.flatten()[static_cast<int64_t>(index)]; }
Tensor number_at(std::nullptr_t, size_t) { return {}; }

template <class Numbers>
void each(const OutTensors& out, const std::vector<Tensors>& lists, const Numbers& numbers, Tensor (*compute)(const Item&)) {
    for (size_t i = 0; i < out.size(); ++i) {
        const auto member = [&](size_t list) { return list < lists.size() ? up(lists[list].at(i)) : Tensor(); };
        put(out[i], compute({member(0), member(1), member(2), number_at(numbers, i)}));
    }
}

// 0.5 goes away from 0, as the chip's mode has it; torch's goes to the even number.
Tensor rounded_away(const Tensor& x) {
    return at::where(at::abs(at::frac(x)) == 0.5, at::trunc(x) + at::sign(x), at::round(x));
}

}  // namespace

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

}  // namespace cann

#define FOREACH(NAME, PARAMETERS, LISTS, NUMBERS, ...)                                               \
    ACLNN(Foreach##NAME, (STRIP PARAMETERS, OutTensors out) {                                        \
        each(out, {STRIP LISTS}, NUMBERS, [](const Item& i) -> Tensor { return __VA_ARGS__; });      \
    })
#define ONE(NAME, ...) FOREACH(NAME, (Tensors x), (x), nullptr, __VA_ARGS__)
#define ONE_AND_A_NUMBER(NAME, ...)                                                       \
    FOREACH(NAME##ScalarV2, (Tensors x, Scalar scalar), (x), scalar, __VA_ARGS__)         \
    FOREACH(NAME##ScalarList, (Tensors x, Scalars scalars), (x), scalars, __VA_ARGS__)
#define TWO(NAME, ...) FOREACH(NAME##List, (Tensors x1, Tensors x2), (x1, x2), nullptr, __VA_ARGS__)
#define TWO_SCALED(NAME, ...) \
    FOREACH(NAME##ListV2, (Tensors x1, Tensors x2, Scalar alpha), (x1, x2), alpha, __VA_ARGS__)
#define THREE(NAME, ...)                                                                                               \
    FOREACH(NAME##ScalarV2, (Tensors x1, Tensors x2, Tensors x3, Scalar scalar), (x1, x2, x3), scalar, __VA_ARGS__)    \
    FOREACH(NAME##ScalarList, (Tensors x1, Tensors x2, Tensors x3, Tensor scalars), (x1, x2, x3), scalars, __VA_ARGS__)
FOREACH_OF_ONE(ONE)
FOREACH_OF_ONE_AND_A_NUMBER(ONE_AND_A_NUMBER)
FOREACH_OF_TWO(TWO)
FOREACH_OF_TWO_SCALED(TWO_SCALED)
FOREACH_OF_THREE(THREE)
FOREACH(LerpScalar, (Tensors x1, Tensors x2, Scalar weight), (x1, x2), weight, i.a + i.number * (i.b - i.a))
FOREACH(LerpList, (Tensors x1, Tensors x2, Tensors weight), (x1, x2, weight), nullptr, i.a + i.c * (i.b - i.a))
FOREACH(PowScalarAndTensor, (Scalar scalar, Tensors x), (x), scalar, at::pow(i.number, i.a))
FOREACH(Norm, (Tensors x, Scalar scalar), (x), scalar, at::linalg_vector_norm(i.a, i.number.item()))
FOREACH(RoundOffNumberV2, (Tensors x, Scalar roundMode), (x), roundMode, rounded(i.a, i.number.item<int64_t>()))

ACLNN(ForeachCopy, (Tensors x, OutTensors out) {
    for (size_t i = 0; i < out.size(); ++i) {
        if (out[i].scalar_type() == x[i].scalar_type()) move(out[i], x[i]);
        else put(out[i], x[i]);
    }
})
ACLNN(ForeachZeroInplace, (OutTensors x) {
    for (const Tensor& each : x) each.zero_();
})
