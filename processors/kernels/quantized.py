"""Linear layers whose weights are integers of 8 bits: the layer, its inverse, and what computes it on each device.

The weight is int8 with a scale for each output channel, symmetric about zero: `weight * scale` stands for the float
weight. Activations keep their dtype (W8A16). An NPU multiplies by such a weight in one operator; elsewhere the float
weight of one layer exists while that layer computes, so that a model's weights take half the memory on every device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ascend.chips import WEIGHT_QUANT_MATMUL, has_operator
from processors.kernels.call import chip_of
from processors.kernels.limit import Limit

LARGEST = 127  # -128 is left out, so that a weight and its negative are equally far from their integers

PAGE = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_weight_quant_batchmatmul.md"
SOURCE = "ops-nn matmul/weight_quant_batch_matmul_v2/op_host/op_api/aclnn_weight_quant_batch_matmul_v2.cpp"
DERIVATIVES = "op-plugin op_plugin/config/derivatives.yaml"


class LinearCall(NamedTuple):
    """All that decides whether the operator of an NPU computes a layer."""

    device_type: str
    chip: str | None
    dtype: torch.dtype  # of the activations
    scale_dtype: torch.dtype
    rows: int
    in_features: int
    out_features: int
    needs_grad: bool = False


LIMITS: tuple[Limit[LinearCall], ...] = (
    Limit("an operator of NPUs", PAGE, lambda call: call.device_type == "npu"),
    Limit("310P, A2 and A3 only", PAGE, lambda call: has_operator(call.chip, WEIGHT_QUANT_MATMUL)),
    Limit(
        "float16, and bfloat16 on other chips than 310P, which has none",
        f"{SOURCE}:74-76",
        lambda call: call.dtype in (torch.float16, torch.bfloat16),
    ),
    Limit("activations in the dtype of the scale", f"{SOURCE}:935", lambda call: call.dtype == call.scale_dtype),
    Limit("at least one row", f"{SOURCE}:527", lambda call: call.rows > 0),
    Limit("at most 65535 channels", PAGE, lambda call: max(call.in_features, call.out_features) <= 65535),
    Limit("has no derivative, and a gradient is needed", DERIVATIVES, lambda call: not call.needs_grad),
)


class QuantizedLinear(torch.nn.Linear):
    """`nn.Linear` with an int8 weight.

    A layer becomes one by `quantize` and an ordinary one by `dequantize`: its class changes, while the object, its
    bias and its hooks stay. It is a Linear still, so that adapters go on top of it and graphs keep its weight in the
    layout of the matrix unit.

    Attributes:
        weight: `[out_features, in_features]`, int8.
        scale: `[out_features]`, in the dtype that the weight had. `module.to(dtype)` converts it, which changes all
            weights of a channel by up to 2**-11 (float16) or 2**-8 (bfloat16) of themselves.
    """

    scale: torch.nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear(x, weight * scale.unsqueeze(1), bias)`.

    Args:
        x: `[..., in_features]`, floating point.
        weight: `[out_features, in_features]`, int8.
        scale: `[out_features]`, in the dtype of `x`.
        bias: `[out_features]`, in the dtype of `x`, or None.
    """
    if all(limit.allows(_describe(x, weight, scale)) for limit in LIMITS):
        return _npu_linear(x, weight, scale, bias)
    return F.linear(x, dequantized(weight, scale), bias)


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float weight `[out_features, in_features]` that `weight` and `scale` stand for, in the scale's dtype."""
    return weight.to(scale.dtype) * scale.unsqueeze(1)


def quantize(layer: torch.nn.Linear) -> None:
    """Turn an ordinary layer into a `QuantizedLinear`. Each weight moves by at most half a step, `scale / 2`.

    A step is a 127th of the largest weight of its output channel. The scale is rounded to the dtype of the weight
    first, and the weights to steps of that: its rounding then adds no error.
    """
    weight = layer.weight.detach()
    exact = weight.float()
    scale = (exact.abs().amax(dim=1) / LARGEST).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, 1.0)  # a channel of zeros
    steps = (exact / scale.float().unsqueeze(1)).round().clamp(-LARGEST, LARGEST)
    install(layer, steps.to(torch.int8), scale)


def install(layer: torch.nn.Linear, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Turn `layer` into a `QuantizedLinear` with this int8 `weight` and `scale`, whatever weight it has had."""
    layer.__class__ = QuantizedLinear
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.scale = torch.nn.Parameter(scale, requires_grad=False)


def dequantize(layer: QuantizedLinear) -> None:
    """Turn `layer` into an ordinary one with the weights that it has computed with; they require no gradient.

    They are not those from before `quantize`, which are gone.
    """
    weight = dequantized(layer.weight.detach(), layer.scale.detach())
    ordinary: torch.nn.Linear = layer
    ordinary.__class__ = torch.nn.Linear
    ordinary.weight = torch.nn.Parameter(weight, requires_grad=False)
    del ordinary.scale


def _describe(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> LinearCall:
    return LinearCall(
        device_type=x.device.type,
        chip=chip_of(x.device),
        dtype=x.dtype,
        scale_dtype=scale.dtype,
        rows=x.shape[:-1].numel(),
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        needs_grad=torch.is_grad_enabled() and x.requires_grad,
    )


def _npu_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None and x.dtype == torch.bfloat16:
        bias = bias.float()  # as the operator wants it
    # A2 takes matrices, of which the weight is best transposed; without gaps, as all chips want them.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    product = torch.ops.npu.npu_weight_quant_batchmatmul(rows, weight.t(), scale, bias=bias)
    return product.view(*x.shape[:-1], weight.shape[0])
