// Random numbers, of the same generator as eager calls: the key is torch_npu's seed, the counter [0, its offset].
#include "graph/operation.h"
#include "ops/shared.h"

namespace cann::graph {
namespace {

uint64_t number(const Tensor& x, int64_t index) { return x.to(at::kLong).flatten()[index].item<int64_t>(); }

Tensor drawn(const Operands& x, Tensor (*draw)(at::IntArrayRef, uint64_t, uint64_t)) {
    if (x.compiling()) return at::empty(x.ints(0), at::device(at::kMeta).dtype(at::kFloat));
    return draw(x.ints(0), number(x[1], 0), number(x[2], 1));
}

Tensor bernoulli(const Operands& x) {
    if (x.compiling()) return at::empty(x.ints(0), at::device(at::kMeta).dtype(at::kFloat));
    return uniform(x.ints(0), number(x[2], 0), number(x[3], 0)) < x.up(1);
}

// Whole groups of 128 bits.
Tensor mask(const Operands& x) {
    const int64_t bytes = (c10::multiply_integers(x.ints(0)) + 127) / 128 * 16;
    if (x.compiling()) return at::empty({bytes}, at::device(at::kMeta).dtype(at::kByte));
    return dropout_mask(bytes, x[1].item<double>(), number(x[2], 0), number(x[4], 1));
}

Tensor masked(const Operands& x) {
    return x.compiling() ? at::empty_like(x[0]) : drop_out(x[0], x[1], x[2].item<double>());
}

Tensor permutation(const Operands& x) {
    x.integer("layout", 0);
    const Ints count = x.ints(0);
    if (x.compiling()) return at::empty(count, at::device(at::kMeta).dtype(at::kLong));
    return at::argsort(uniform(count, number(x[1], 0), number(x[2], 0)));
}

}  // namespace
}  // namespace cann::graph

GE(StatelessRandomUniformV2, as(x.dtype("dtype", at::kFloat), drawn(x, uniform)))
GE(StatelessRandomNormalV2, as(x.dtype("dtype", at::kFloat), drawn(x, normal)))
GE(StatelessBernoulli, as(x.dtype("dtype", at::kFloat), bernoulli(x)))
GE(StatelessRandperm, as(x.dtype("dtype", at::kLong), permutation(x)))
GE(StatelessDropOutGenMask, as(at::kByte, mask(x)))
GE(DropOutDoMask, masked(x))
