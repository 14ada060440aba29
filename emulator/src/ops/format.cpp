// Changes of storage format: torch_npu asks for them through the old interface (see aclop.cpp).
#include "ops/operator.h"

namespace cann {
void store(const Tensor& logical, const TensorArgument& target) {
    Tensor stored = at::from_blob(target.data, is_private(target.format) ? target.storage_sizes : target.sizes, target.dtype);
    move(stored, is_private(target.format) ? pack(logical, target.format) : logical);
}
}  // namespace cann
