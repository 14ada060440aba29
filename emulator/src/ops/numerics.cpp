#include "ops/numerics.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "runtime/runtime.h"
#include "runtime/settings.h"

namespace cann {
namespace {

constexpr double kLargestHalf = 65504;
constexpr float kRoundsToInfinity = 65520;

bool is_16_bit_float(const at::Tensor& tensor) {
    return tensor.defined() && (tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16);
}

bool host_has(const char* query) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(query, "").typed<bool()>().call();
}

bool host_multiplies(at::ScalarType dtype) {
    static const bool bfloat16 = host_has("mkldnn::_is_mkldnn_bf16_supported");
    static const bool float16 = host_has("mkldnn::_is_mkldnn_fp16_supported");
    return dtype == at::kHalf ? float16 : bfloat16;
}

at::Tensor saturated(const at::Tensor& value) {
    if (value.is_meta()) return value;  // the compiler of graphs only asks for shapes
    const at::Tensor wide = value.to(at::kFloat);
    if (wide.numel() == 0) return value;
    const auto [lowest, highest] = wide.aminmax();  // NaN where there is one, which no comparison holds for
    if (lowest.item<float>() > -kRoundsToInfinity && highest.item<float>() < kRoundsToInfinity) return value;
    overflowed = true;
    return wide.nan_to_num(0., kLargestHalf, -kLargestHalf).clamp(-kLargestHalf, kLargestHalf);
}

at::Tensor round_to_half(const at::Tensor& value) {
    return (saturates() ? saturated(value) : value).to(at::kHalf).to(at::kFloat);
}

at::Tensor round_to_hf32(const at::Tensor& value) {
    constexpr int32_t kDropped = 1 << 13;
    const at::Tensor bits = value.contiguous().view(at::kInt);
    return (bits + kDropped / 2).bitwise_and(-kDropped).view(at::kFloat);
}

}  // namespace

at::Tensor up(const at::Tensor& tensor) { return is_16_bit_float(tensor) ? tensor.to(at::kFloat) : tensor; }

at::Tensor cube(const at::Tensor& tensor, int8_t cube_math_type) {
    constexpr int8_t kAllowLower = 1, kUseHalf = 2, kUseHf32 = 3;
    if (!tensor.defined()) return tensor;
    if (is_16_bit_float(tensor)) return host_multiplies(tensor.scalar_type()) ? tensor : up(tensor);
    if (tensor.scalar_type() != at::kFloat) return tensor;
    if (!chip().inf_nan || cube_math_type == kUseHalf) return round_to_half(tensor);
    return cube_math_type == kAllowLower || cube_math_type == kUseHf32 ? round_to_hf32(tensor) : tensor;
}

void put(const at::Tensor& out, const at::Tensor& value) {
    const bool may_overflow = out.scalar_type() == at::kHalf && value.is_floating_point() && saturates();
    move(out, may_overflow ? saturated(value) : value);
}

void put_if_given(const at::Tensor& out, const at::Tensor& value) {
    if (out.defined() && out.numel() > 0) put(out, value);
}

void put_of_kind(const at::Tensor& out, const at::Tensor& value) {
    TORCH_CHECK(c10::canCast(value.scalar_type(), out.scalar_type()), "result type ", value.scalar_type(),
                " can't be cast to the desired output type ", out.scalar_type());
    put(out, value);
}

void move(const at::Tensor& out, const at::Tensor& value) {
    TORCH_CHECK(out.numel() == value.numel(), "the result has the shape ", value.sizes(), ", but the output ",
                out.sizes());
    out.copy_(out.sizes() == value.sizes() ? value : value.reshape(out.sizes()));
}

at::Tensor pack_bits(const at::Tensor& bits) {
    const int64_t missing = -bits.size(-1) & 7;
    const at::Tensor whole = missing == 0 ? bits : at::constant_pad_nd(bits, {0, missing});
    return (whole.to(at::kByte).unflatten(-1, {-1, 8}) * at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, at::kByte)).sum(-1, false, at::kByte);
}

at::Tensor unpack_bits(const at::Tensor& bytes, at::IntArrayRef shape) {
    const at::Tensor bits = bytes.flatten().unsqueeze(-1).bitwise_right_shift(at::arange(8, at::kByte)).bitwise_and(1);
    return bits.flatten().narrow(0, 0, c10::multiply_integers(shape)).view(shape);
}

}  // namespace cann
