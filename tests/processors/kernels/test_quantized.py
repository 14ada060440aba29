"""Linear layers with int8 weights: how far they are from float32, when an NPU's operator is taken, what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ascend.chips import FAMILIES
from processors.kernels.quantized import LIMITS, LinearCall, QuantizedLinear, dequantize, linear, quantize
from tests.on_npu.inputs import numbers

# A weight is off by at most half a step, evenly: by step / sqrt(12) in the mean of squares. A step is a 127th of the
# largest weight of a channel, which is 4.5 standard deviations for normal weights in channels of up to 100,000. So the
# mean error of the weights, and of what independent inputs give, is 4.5 / (127 * sqrt(12)) = 1.02 % of them.
RELATIVE_ERROR = 0.0102
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a weight, and of a result
DTYPES = tuple(ROUNDING)
TAKEN = LinearCall("npu", "Ascend910B3", torch.float16, torch.float16, 2, 64, 64)


def layer_of(dtype: torch.dtype = torch.float32, inputs: int = 320, outputs: int = 96, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer.to(dtype)


def quantized(layer: nn.Linear) -> QuantizedLinear:
    layer = copy.deepcopy(layer)
    quantize(layer)
    assert isinstance(layer, QuantizedLinear)
    return layer


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    int8 = quantized(layer)
    assert int8.weight.dtype == torch.int8 and int8.scale.dtype == dtype
    steps = int8.scale.float().unsqueeze(1)
    moved = (int8.weight.float() * steps - layer.weight.float()).abs()
    assert (moved <= steps * (0.5 + 1e-4)).all()
    assert (int8.weight.abs().amax(dim=1) == 127).all()  # each channel uses its whole range
    assert relative_error(int8.weight.float() * steps, layer.weight) < RELATIVE_ERROR


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((320,), (5, 320), (2, 3, 320), (0, 320)))
def test_a_layer_is_close_to_that_with_float32_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), numbers(shape, dtype, seed=1)
    with torch.no_grad():
        expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
        actual = quantized(layer)(x)
    assert actual.dtype == dtype and actual.shape == expected.shape
    if expected.numel():
        assert relative_error(actual, expected) < RELATIVE_ERROR + 2 * ROUNDING[dtype]


def test_channels_of_zeros_and_of_outliers_keep_their_own_scale() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, 0] = 1000
        x = numbers((7, 320), torch.float32)
        actual, expected = quantized(layer)(x), layer(x)
    assert (quantized(layer).scale > 0).all()  # a product by 0 / 0 is not the same on every device
    assert torch.equal(actual[:, 0], expected[:, 0])
    assert relative_error(actual[:, 2:], expected[:, 2:]) < RELATIVE_ERROR


def test_an_ordinary_layer_comes_back_that_computes_the_same() -> None:
    layer = layer_of()
    quantize(layer)
    x, bias, integers = numbers((7, 320), torch.float32), layer.bias, layer.weight
    with torch.no_grad():
        expected = layer(x)
        dequantize(layer)
        assert type(layer) is nn.Linear and layer.bias is bias and not layer.weight.requires_grad
        assert torch.equal(layer(x), expected)
        assert sorted(layer.state_dict()) == ["bias", "weight"]
        quantize(layer)
    assert torch.equal(layer.weight, integers)


def test_a_layer_may_be_cast_moved_and_copied() -> None:
    layer = quantized(layer_of())
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == torch.int8 and half.scale.dtype == half.bias.dtype == torch.float16
    assert half.to("meta").weight.is_meta
    assert sum(tensor.nbytes for tensor in layer.parameters()) == 320 * 96 + 2 * 96 * 4
    assert "int8" in repr(layer)


def test_gradients_pass_through_to_the_inputs() -> None:
    layer, x = quantized(layer_of()), numbers((7, 320), torch.float32).requires_grad_()
    layer(x).square().sum().backward()
    inner = x.detach().requires_grad_()
    F.linear(inner, layer.weight.float() * layer.scale.unsqueeze(1), layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, inner.grad)
    assert layer.weight.grad is None


def test_a_compiled_layer_is_one_graph() -> None:
    layer, x = quantized(layer_of()), numbers((7, 320), torch.float32)
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device_type": "cpu", "chip": None}, "an operator of NPUs"),
        ({"chip": "Ascend910A"}, "310P, A2 and A3 only"),  # the first generation, which has no such operator
        ({"dtype": torch.float32, "scale_dtype": torch.float32}, "float16, and bfloat16"),
        ({"scale_dtype": torch.float32}, "activations in the dtype of the scale"),
        ({"rows": 0}, "at least one row"),
        ({"in_features": 65536}, "at most 65535 channels"),
        ({"needs_grad": True}, "has no derivative"),
    ],
)
def test_when_the_operator_is_not_taken(change: dict[str, object], reason: str) -> None:
    assert all(limit.allows(TAKEN) for limit in LIMITS)
    refusing = [limit for limit in LIMITS if not limit.allows(TAKEN._replace(**change))]
    assert refusing and refusing[0].reason.startswith(reason)
    assert all(limit.source for limit in LIMITS)


@pytest.mark.parametrize("family, has_it", [("310P", True), ("A2", True), ("A3", True), ("950", False)])
def test_which_chips_have_the_operator(family: str, has_it: bool) -> None:
    [prefixes] = [row.prefixes for row in FAMILIES if row.name == family]
    assert all(limit.allows(TAKEN._replace(chip=prefixes[0])) for limit in LIMITS) == has_it


def test_a_weight_that_is_not_contiguous_and_no_bias() -> None:
    layer = quantized(layer_of(bias=False))
    x = numbers((4, 640), torch.float32)[:, ::2]
    weight = layer.weight.t().contiguous().t()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, layer.scale), layer(x))
