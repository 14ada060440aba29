// Element by element: arithmetic, comparisons, activations.
#include "graph/operation.h"

GE(Add, x.up(0) + x.up(1))
