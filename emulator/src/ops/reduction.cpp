// Sums, extremes, orders and searches. 16-bit operands are summed in float32.
#include "ops/operator.h"

namespace cann {
namespace {

at::OptionalIntArrayRef some(const Ints& dims) { return dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims); }

// Values and indices; -0-dimensional tensors keep their shape.
template <class Result>
void put_pair(const Tensor& values, const Tensor& indices, const Result& result) {
    move(values, std::get<0>(result));
    move(indices, std::get<1>(result));
}

}  // namespace
}  // namespace cann

FUNCTION(ReduceSum, (Tensor self, Ints dims, bool keepdim, ScalarType dtype), at::sum(up(self), some(dims), keepdim))
FUNCTION(ReduceNansum, (Tensor self, Ints dims, bool keepdim, ScalarType dtype), at::nansum(up(self), some(dims), keepdim))
FUNCTION(Mean, (Tensor self, Ints dims, bool keepdim, ScalarType dtype),
         at::mean(self.is_floating_point() ? up(self) : self.to(at::kFloat), some(dims), keepdim))
FUNCTION(Prod, (Tensor self, ScalarType dtype), at::prod(up(self)))
FUNCTION(ProdDim, (Tensor self, int64_t dim, bool keepdim, ScalarType dtype), at::prod(up(self), dim, keepdim))
FUNCTION(Std, (Tensor self, Ints dims, int64_t correction, bool keepdim), at::std(up(self), some(dims), Scalar(correction), keepdim))
FUNCTION(VarCorrection, (Tensor self, Ints dims, int64_t correction, bool keepdim),
         at::var(up(self), some(dims), Scalar(correction), keepdim))
ACLNN(VarMean, (Tensor self, Ints dims, int64_t correction, bool keepdim, OutTensor var, OutTensor mean) {
    const auto both = at::var_mean(up(self), some(dims), Scalar(correction), keepdim);
    put(var, std::get<0>(both));
    put(mean, std::get<1>(both));
})
ACLNN(StdMeanCorrection, (Tensor self, Ints dims, int64_t correction, bool keepdim, OutTensor std, OutTensor mean) {
    const auto both = at::std_mean(up(self), some(dims), Scalar(correction), keepdim);
    put(std, std::get<0>(both));
    put(mean, std::get<1>(both));
})
FUNCTION(Norm, (Tensor self, Scalar p, Ints dims, bool keepdim), at::linalg_vector_norm(up(self), p, some(dims), keepdim))
FUNCTION(LinalgVectorNorm, (Tensor self, Scalar ord, Ints dims, bool keepdim, ScalarType dtype),
         at::linalg_vector_norm(up(self), ord, some(dims), keepdim))
FUNCTION(Pdist, (Tensor self, float p), at::pdist(up(self), p))
FUNCTION(LogSumExp, (Tensor self, Ints dims, bool keepdim), at::logsumexp(up(self), dims, keepdim))
FUNCTION(Cumsum, (Tensor self, int64_t dim, ScalarType dtype), at::cumsum(up(self).to(at::isIntegralType(dtype, true) ? dtype : up(self).scalar_type()), dim))
FUNCTION(Cumprod, (Tensor input, Scalar dim, ScalarType dtype), at::cumprod(up(input), dim.toLong()))
FUNCTION(Trace, (Tensor self), at::trace(up(self)))

FUNCTION(All, (Tensor self, Ints dims, bool keepdim), at::all(self, some(dims), keepdim))
FUNCTION(Any, (Tensor self, Ints dims, bool keepdim), at::any(self, some(dims), keepdim))
FUNCTION(Amax, (Tensor self, Ints dims, bool keepdim), at::amax(self, dims, keepdim))
FUNCTION(Amin, (Tensor self, Ints dims, bool keepdim), at::amin(self, dims, keepdim))
FUNCTION(Max, (Tensor self), at::max(self))
FUNCTION(Min, (Tensor self), at::min(self))
FUNCTION(ArgMax, (Tensor self, int64_t dim, bool keepdim), at::argmax(self, dim, keepdim))
FUNCTION(ArgMin, (Tensor self, int64_t dim, bool keepdim), at::argmin(self, dim, keepdim))
ACLNN(MaxDim, (Tensor self, int64_t dim, bool keepdim, OutTensor out, OutTensor indices) {
    put_pair(out, indices, at::max(self, dim, keepdim));
})
ACLNN(MinDim, (Tensor self, int64_t dim, bool keepdim, OutTensor out, OutTensor indices) {
    put_pair(out, indices, at::min(self, dim, keepdim));
})
ACLNN(Aminmax, (Tensor self, Ints dims, bool keepdim, OutTensor min, OutTensor max) {
    move(min, at::amin(self, dims, keepdim));
    move(max, at::amax(self, dims, keepdim));
})
ACLNN(AminmaxDim, (Tensor self, int64_t dim, bool keepdim, OutTensor min, OutTensor max) {
    move(min, at::amin(self, dim, keepdim));
    move(max, at::amax(self, dim, keepdim));
})
ACLNN(AminmaxAll, (Tensor self, OutTensor min, OutTensor max) {
    move(min, at::min(self));
    move(max, at::max(self));
})

ACLNN(Sort, (Tensor self, bool stable, int64_t dim, bool descending, OutTensor values, OutTensor indices) {
    put_pair(values, indices, at::sort(self, stable, dim, descending));
})
ACLNN(Topk, (Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, OutTensor values, OutTensor indices) {
    put_pair(values, indices, at::topk(self, k, dim, largest, sorted));
})
FUNCTION(Bincount, (Tensor self, Tensor weights, int64_t minlength),
         at::bincount(self, weights.defined() ? std::optional(weights) : std::nullopt, minlength))
FUNCTION(SearchSorted, (Tensor sequence, Tensor self, bool int32, bool right, Tensor sorter),
         at::searchsorted(sequence, self, int32, right, std::nullopt, sorter.defined() ? std::optional(sorter) : std::nullopt))
FUNCTION(SearchSorteds, (Tensor sequence, Scalar self, bool int32, bool right, Tensor sorter),
         at::searchsorted(sequence, self, int32, right, std::nullopt, sorter.defined() ? std::optional(sorter) : std::nullopt))
FUNCTION(IsInTensorScalar, (Tensor element, Scalar test, bool unique, bool invert), at::isin(element, test, unique, invert))
FUNCTION(IsInScalarTensor, (Scalar element, Tensor test, bool unique, bool invert), at::isin(element, test, unique, invert))

namespace cann {
// What the caller did not ask for arrives as a null or an empty tensor.
static void set_if_asked(const Resizable& out, const Tensor& value) {
    if (out.argument && out.argument->bytes() > 0) out.set(value);
}
}  // namespace cann
ACLNN(Unique, (Tensor self, bool sorted, bool return_inverse, Resizable values, Resizable inverse) {
    const auto [unique, where, counts] = at::_unique2(self, true, true, false);
    values.set(unique);
    if (return_inverse) set_if_asked(inverse, where);
})
ACLNN(Unique2, (Tensor self, bool sorted, bool return_inverse, bool return_counts, Resizable values, Resizable inverse, Resizable counts) {
    const auto [unique, where, count] = at::_unique2(self, true, true, true);
    values.set(unique);
    if (return_inverse || return_counts) set_if_asked(inverse, where);
    if (return_counts) set_if_asked(counts, count);
})
ACLNN(UniqueConsecutive, (Tensor self, bool return_inverse, bool return_counts, int64_t dim, Resizable values, Resizable inverse, Resizable counts) {
    constexpr int64_t kFlattened = 1000;  // what torch_npu passes for "no dimension"
    const auto [unique, where, count] = at::unique_consecutive(self, true, true, dim == kFlattened ? std::nullopt : std::optional(dim));
    values.set(unique);
    if (return_inverse) set_if_asked(inverse, where);
    if (return_counts) set_if_asked(counts, count);
})
