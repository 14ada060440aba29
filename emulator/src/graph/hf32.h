// What torchair sets for all graphs of the process.
#pragma once

namespace cann::graph {

enum class Unit { kConvolution, kMatrix };

// Whether float32 operands may be rounded to HF32 (10 bits of mantissa), on chips that have it.
bool allows_hf32(Unit unit);
// Two digits: for convolutions and for matrix products.
void set_hf32(const char* digits);

}  // namespace cann::graph
