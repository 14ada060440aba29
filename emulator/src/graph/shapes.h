// Shapes that torch finds in Python only, which a process that compiles offline models does not have.
#pragma once

#include "graph/operation.h"

namespace cann::graph {

// A tensor of these sizes that only stands for its shape.
inline Tensor shaped(const Ints& sizes, ScalarType dtype) {
    return at::empty(sizes, at::device(at::kMeta).dtype(dtype));
}

// A function of each element that keeps the dtype.
inline Tensor by_element(const Tensor& x, Tensor (*function)(const Tensor&)) {
    return x.is_meta() ? shaped(x.sizes().vec(), x.scalar_type()) : function(x);
}

// As one of the operands broadcast against each other.
Tensor shaped_by_all(const std::vector<Tensor>& operands, ScalarType dtype);

}  // namespace cann::graph
