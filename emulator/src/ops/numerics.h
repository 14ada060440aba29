// How the chips compute: 16-bit operands are exact, sums are float32, and a result is rounded once.
#pragma once

#include <ATen/ATen.h>

namespace cann {

// 16-bit floating point as float32; everything else as it is.
at::Tensor up(const at::Tensor& tensor);

// An operand of the matrix unit. 16 bits stay if this host multiplies them well, which then accumulates in float32.
// float32 becomes what `cube_math_type` of torch_npu says: 310P rounds it to float16 in any case, the others may
// round it to HF32 (10 bits of mantissa).
at::Tensor cube(const at::Tensor& tensor, int8_t cube_math_type);

// Writes the result of an arithmetic operator: rounds to the dtype of `out`. On a chip that saturates, float16 beyond
// the range becomes +-65504, NaN becomes 0, and the overflow flag is raised.
void put(const at::Tensor& out, const at::Tensor& value);

// The same, of a result that the caller may not have asked for: `out` is undefined or empty then.
void put_if_given(const at::Tensor& out, const at::Tensor& value);

// The same; refuses to make an integer of a fraction, as torch does in `integers += fractions`.
void put_of_kind(const at::Tensor& out, const at::Tensor& value);

// Writes what an operator only moves: no arithmetic, so nothing saturates.
void move(const at::Tensor& out, const at::Tensor& value);

// Booleans along the last dimension, as bytes: the lowest bit first, and zeros to the end of the last byte.
at::Tensor pack_bits(const at::Tensor& bits);
// `shape` of 0 and 1 from packed bits, the lowest of a byte first; bits beyond the shape are padding.
at::Tensor unpack_bits(const at::Tensor& bytes, at::IntArrayRef shape);

}  // namespace cann
