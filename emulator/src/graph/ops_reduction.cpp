// Sums, extremes, orders. 16-bit operands are summed in float32.
#include "graph/shapes.h"

namespace cann::graph {
namespace {

// No dimensions stand for all of them.
Ints dims_of(const Tensor& x, Ints dims) {
    if (dims.empty()) {
        for (int64_t i = 0; i < x.dim(); ++i) dims.push_back(i);
    }
    return dims;
}

bool keeps(const Operands& x) { return x.flag("keep_dims"); }

// Over the dimensions that the second operand names; without any, over all, or over none.
Tensor reduced(const Operands& x, Tensor (*reduce)(const Tensor&, const Ints&, bool)) {
    const Ints dims = x.ints(1);
    const bool keep = keeps(x);
    if (x.flag("noop_with_empty_axes") && dims.empty()) return x[0];
    return reduce(x.up(0), dims_of(x[0], dims), keep);
}

Tensor sum(const Tensor& x, const Ints& dims, bool keep) { return at::sum(x, dims, keep, x.scalar_type()); }
Tensor mean(const Tensor& x, const Ints& dims, bool keep) { return at::mean(x, dims, keep); }
Tensor maximum(const Tensor& x, const Ints& dims, bool keep) { return at::amax(x, dims, keep); }
Tensor minimum(const Tensor& x, const Ints& dims, bool keep) { return at::amin(x, dims, keep); }

Tensor product(const Tensor& x, const Ints& all, bool keep) {
    Tensor value = x;
    Ints dims = all;
    for (int64_t& dim : dims) dim = dim < 0 ? dim + value.dim() : dim;
    std::sort(dims.rbegin(), dims.rend());
    for (int64_t dim : dims) value = at::prod(value, dim, keep);
    return value;
}

Tensor any_of(const Operands& x) { return at::any(x[0], at::IntArrayRef(dims_of(x[0], x.ints(1))), keeps(x)); }
Tensor all_of(const Operands& x) { return at::all(x[0], at::IntArrayRef(dims_of(x[0], x.ints(1))), keeps(x)); }

// The position of an extreme, which GE counts in 32 bits, and then the extreme.
Results with_position(const std::tuple<Tensor, Tensor>& values_and_positions) {
    return {std::get<1>(values_and_positions).to(at::kInt), std::get<0>(values_and_positions)};
}
Results largest(const Operands& x) { return with_position(at::max(x[0], x.integer("dimension"), keeps(x))); }
Results smallest(const Operands& x) { return with_position(at::min(x[0], x.integer("dimension"), keeps(x))); }

Results sorted(const Operands& x) {
    const auto [values, positions] = at::sort(x[0], x.flag("stable"), x.integer("axis", -1), x.flag("descending"));
    return {values, positions.to(at::kInt)};
}

Results top(const Operands& x) {
    x.integer("sort_policy", 1);  // which of equal values comes first is not promised
    const bool in_order = x.flag("sorted", true);
    const int64_t count = x.ints(1).at(0), dim = x.integer("dim", -1);
    const auto [values, positions] = at::topk(x[0], count, dim, x.flag("largest", true), in_order);
    return {values, positions.to(at::kInt)};
}

Tensor cumulated(const Operands& x) {
    const bool exclusive = x.flag("exclusive"), reverse = x.flag("reverse");
    const int64_t dim = x.ints(1).at(0);
    const Tensor wide = x.up(0);
    if (x.compiling()) return shaped(wide.sizes().vec(), wide.scalar_type());
    const Tensor ordered = reverse ? wide.flip(dim) : wide;
    Tensor total = at::cumsum(ordered, dim, wide.scalar_type());
    if (exclusive) total = total - ordered;
    return reverse ? total.flip(dim) : total;
}

Results deviation(const Operands& x) {
    const Ints dims = dims_of(x[0], x.list("dim"));
    x.flag("is_mean_out", true);
    const bool keep = x.flag("keepdim");
    if (x.compiling()) return {at::mean(x.up(0), dims, keep), at::mean(x.up(0), dims, keep)};
    const auto both = at::var_mean(x.up(0), at::IntArrayRef(dims), at::Scalar(x.integer("correction", 1)), keep);
    return {at::sqrt(std::get<0>(both)), std::get<1>(both)};
}

// Variances against means that are given in the shape of x.
Tensor variance(const Operands& x, const Ints& dims, bool keep) {
    const int64_t correction = x.flag("unbiased", true) ? x.integer("correction", 1) : 0;
    int64_t count = 1;
    for (int64_t dim : dims) count *= x[0].size(dim);
    return at::sum(at::square(x.up(0) - x.up(1)), dims, keep) / std::max<int64_t>(count - correction, 0);
}

Tensor deviation_from_mean(const Operands& x) {
    const double epsilon = x.real("epsilon", 0.001);
    const Tensor spread = variance(x, dims_of(x[0], x.list("dim")), x.flag("keepdim"));
    return x.flag("invert") ? at::rsqrt(spread + epsilon) : at::sqrt(spread);
}

Tensor variance_or_deviation(const Operands& x) {
    const Tensor spread = variance(x, dims_of(x[0], x.list("dim")), x.flag("keepdim"));
    return x.flag("if_std") ? at::sqrt(spread) : spread;
}

// The extremes of 32 bits stand for an infinite order.
double order_of(double p) { return p >= INT32_MAX ? INFINITY : p <= INT32_MIN ? -INFINITY : p; }

Tensor norm(const Operands& x) {
    x.real("epsilon", 0);
    const Ints dims = dims_of(x[0], x.list("axes"));
    return at::linalg_vector_norm(x.up(0), order_of(x.real("p", 2)), at::IntArrayRef(dims), x.flag("keepdim"));
}

// A norm in two steps: the sum of powers (or what stands for it), and the root.
Tensor powers_summed(const Operands& x) {
    x.real("epsilon", 0);
    const double p = order_of(x.real("p", 2));
    const Ints dims = dims_of(x[0], x.list("axes"));
    const bool keep = x.flag("keepdim");
    const Tensor size = by_element(x.up(0), at::abs);
    if (std::isinf(p)) return p > 0 ? at::amax(size, dims, keep) : at::amin(size, dims, keep);
    return at::sum(p == 0 ? (size != 0).to(at::kFloat) : at::pow(size, p), dims, keep);
}

Tensor root(const Operands& x) {
    const double p = order_of(x.real("p", 2)), epsilon = x.real("epsilon", 1e-12);
    const bool is_norm = p == 0 || p == 1 || std::isinf(p);
    return at::clamp_min(is_norm ? x.up(0) : p == 2 ? at::sqrt(x.up(0)) : at::pow(x.up(0), 1 / p), epsilon);
}

Tensor squared_error(const Operands& x) {
    const std::string reduction = x.text("reduction", "mean");
    const Tensor error = at::square(x.up(0) - x.up(1));
    return reduction == "none" ? error : reduction == "sum" ? at::sum(error) : at::mean(error);
}

Tensor positions(const Operands& x) {
    const ScalarType dtype = x.dtype("dtype", at::kLong);
    const bool right = x.flag("right");
    if (x.compiling()) return x[1].new_empty(x[1].sizes(), x[1].options().dtype(dtype));
    const std::optional<Tensor> order = x[2].defined() ? std::optional(x[2]) : std::nullopt;
    return at::searchsorted(x[0], x[1], dtype == at::kInt, right, std::nullopt, order);
}

}  // namespace
}  // namespace cann::graph

GE(ReduceSum, reduced(x, sum))
GE(ReduceMean, reduced(x, mean))
GE(ReduceMax, reduced(x, maximum))
GE(ReduceMin, reduced(x, minimum))
GE(ReduceProd, reduced(x, product))
GE(ReduceProdD, product(x.up(0), dims_of(x[0], x.list("axes")), keeps(x)))
GE(ReduceLogSumExp, at::logsumexp(x.up(0), dims_of(x[0], x.ints(1)), keeps(x)))
GE_MOVES(ReduceAny, any_of(x))
GE_MOVES(ReduceAll, all_of(x))
GE_MOVES(ArgMaxV2, at::argmax(x[0], x.ints(1).at(0)).to(x.dtype("dtype", at::kLong)))
GE_MOVES(ArgMin, at::argmin(x[0], x.ints(1).at(0)).to(x.dtype("dtype", at::kLong)))
GE_MOVES(ArgMaxWithValue, largest(x))
GE_MOVES(ArgMinWithValue, smallest(x))
GE_MOVES(Sort, sorted(x))
GE_MOVES(TopKV2, top(x))
GE_MOVES(SortV2, std::get<0>(at::sort(x[0], x.integer("axis", -1), x.flag("descending"))))
GE(Cumsum, cumulated(x))
GE(ReduceStdV2, deviation(x))
GE(ReduceStdWithMean, deviation_from_mean(x))
GE(ReduceStdV2Update, variance_or_deviation(x))
GE(LpNormV2, norm(x))
GE(LpNormReduceV2, powers_summed(x))
GE(LpNormUpdateV2, root(x))
GE(MseLoss, squared_error(x))
GE_MOVES(SearchSorted, positions(x))
