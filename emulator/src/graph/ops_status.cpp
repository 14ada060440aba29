// The overflow flag as eight floats, the first of which says whether a result overflowed. torch_npu asks through aclop.
#include "graph/operation.h"
#include "runtime/settings.h"

namespace cann::graph {
namespace {

Tensor cleared() {
    overflowed = false;
    return at::zeros({8});
}

Tensor status() { return at::full({8}, overflowed ? 1.f : 0.f); }

}  // namespace
}  // namespace cann::graph

GE_MOVES(NPUAllocFloatStatus, at::zeros({8}))
GE_ASSIGNS(NPUGetFloatStatus, status())
GE_ASSIGNS(NPUGetFloatStatusV2, status())
GE_ASSIGNS(NPUClearFloatStatus, cleared())
GE_ASSIGNS(NPUClearFloatStatusV2, cleared())
