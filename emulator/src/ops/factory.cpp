// Tensors made of nothing, and ways to fill one.
#include "ops/operator.h"

ACLNN(InplaceZero, (OutTensor self) { self.zero_(); })
ACLNN(InplaceOne, (OutTensor self) { self.fill_(1); })
ACLNN(InplaceFillScalar, (OutTensor self, Scalar value) { self.fill_(value); })
ACLNN(InplaceFillTensor, (OutTensor self, Tensor value) { self.fill_(value.reshape({})); })
ACLNN(InplaceFillDiagonal, (OutTensor self, Scalar value, bool wrap) { self.fill_diagonal_(value, wrap); })
ACLNN(Eye, (int64_t n, int64_t m, OutTensor out) { at::eye_out(out, n, m); })

namespace cann {
// start, start + step, ... for every element of `out`; the caller has counted them.
static void fill_range(const Tensor& out, const Scalar& start, const Scalar& step) {
    const bool whole = at::isIntegralType(out.scalar_type(), false);
    const Tensor index = at::arange(out.numel(), whole ? at::kLong : at::kDouble);
    put(out, at::add(at::mul(index, step), start));
}
}  // namespace cann
ACLNN(Arange, (Scalar start, Scalar end, Scalar step, OutTensor out) { fill_range(out, start, step); })
ACLNN(Range, (Scalar start, Scalar end, Scalar step, OutTensor out) { fill_range(out, start, step); })
FUNCTION(Linspace, (Scalar start, Scalar end, int64_t steps), at::linspace(start, end, steps))
FUNCTION(LogSpace, (Scalar start, Scalar end, int64_t steps, double base), at::logspace(start, end, steps, base))
FUNCTION(OneHot, (Tensor self, int classes, Tensor on_value, Tensor off_value, int64_t axis),
         at::where(at::one_hot(self.to(at::kLong), classes).to(at::kBool).movedim(-1, axis), on_value, off_value))
BOTH(Tril, (Tensor self, int64_t diagonal), at::tril(self, diagonal))
BOTH(Triu, (Tensor self, int64_t diagonal), at::triu(self, diagonal))
