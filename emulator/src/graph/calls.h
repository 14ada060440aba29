// Steps of a graph as calls of operators: for the rules of the chip, the check of their memory, and the trace.
#pragma once

#include "graph/runner.h"
#include "ops/operator.h"

namespace cann::graph {

// Without a memory, the tensors of the call have no addresses.
std::shared_ptr<TensorArgument> argument_of(const Compiled& compiled, int value, const Memory* memory);
Call call_of(const Compiled& compiled, const Step& step, const Memory* memory);

// The error code of a step that the chip refuses, 0 for one that it takes.
int refuse(const Compiled& compiled, const Step& step);

}  // namespace cann::graph
