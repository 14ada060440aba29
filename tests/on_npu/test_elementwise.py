"""Element by element, against float32 on the CPU, over dtypes, shapes and layouts."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch_npu

from tests.on_npu.helpers import FLOATS, INTEGERS, LAYOUTS, SHAPES, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

Function = Callable[..., torch.Tensor]

ANY = (-3.0, 3.0)
POSITIVE = (0.1, 3.0)
UNIT = (-0.9, 0.9)
UNARY: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("abs", "atan", "ceil", "cos", "erf", "erfc", "exp", "expm1", "floor", "frac", "neg"), ANY),
    **dict.fromkeys(
        ("relu", "round", "sigmoid", "sign", "sin", "sinh", "square", "tanh", "trunc", "asinh", "cosh"), ANY
    ),
    **dict.fromkeys(("log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sqrt"), POSITIVE),
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv"), UNIT),
    "logit": (0.1, 0.9),
    **dict.fromkeys(("exp2", "sinc"), ANY),
    "tan": (-1.0, 1.0),
    "acosh": (1.1, 3.0),
}
BINARY: dict[str, Function] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "atan2": torch.atan2,
    "add alpha": lambda x, y: torch.add(x, y, alpha=3),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=3),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=3),
    "add to a number": lambda x, y: torch.add(torch.tensor(2.5), x, alpha=3) * y,
    "pow": lambda x, y: torch.pow(x.abs(), y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.25),
    "lerp tensor": lambda x, y: torch.lerp(x, y, torch.full_like(x, 0.25)),
    "where": lambda x, y: torch.where(x > y, x, y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.5),
    "clamp": lambda x, y: torch.clamp(x, -1, 1) + y,
    "clamp min": lambda x, y: torch.clamp(x, min=-1) + y,
    "clamp max": lambda x, y: torch.clamp(x, max=1) + y,
    "clamp_min": lambda x, y: torch.clamp_min(x, -1) + y,
    "clamp_max": lambda x, y: torch.clamp_max(x, 1) + y,
    "clamp tensor": lambda x, y: torch.clamp(x, -y, y - 1),
    "clamp min tensor": torch.clamp_min,
    "clamp max tensor": torch.clamp_max,
    "isclose": lambda x, y: torch.isclose(x, y, rtol=0.25, atol=0.125),
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "floor divide": torch.floor_divide,
    "truncated divide": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
}
STEPS = (
    "fmod",
    "remainder",
    "floor divide",
    "truncated divide",
)  # a last bit of the quotient moves them by a whole one
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
SCALARS: dict[str, Function] = {
    "add": lambda x: x + 2,
    "sub": lambda x: x - 2,
    "rsub": lambda x: 2 - x,
    "mul": lambda x: x * 3,
    "div": lambda x: x / 4,
    "pow": lambda x: x**2,
    "rpow": lambda x: 2**x,
    "float": lambda x: x * 0.5,
    "round decimals": lambda x: x.round(decimals=1),
    "logit": lambda x: torch.logit(x, 0.2),
}
WHOLE_SCALARS: dict[str, Function] = {
    "fmod": lambda x: torch.fmod(x, 3),
    "remainder": lambda x: torch.remainder(x, 3),
    "remainder of a number": lambda x: torch.remainder(-7, x.abs() + 1),
    "floor divide": lambda x: torch.floor_divide(x, 3),
    "floored quotient": lambda x: torch.div(x, 3, rounding_mode="floor"),
    "truncated quotient": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "is in": lambda x: torch.isin(x, 3),
    "is not in": lambda x: torch.isin(x, 3, invert=True),
    "holds": lambda x: torch.isin(3, x),
    "does not hold": lambda x: torch.isin(11, x, invert=True),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, dtype: torch.dtype) -> None:
    function = getattr(torch, name)
    low, high = UNARY[name]
    for shape in SHAPES:
        x = numbers(shape, dtype, low=low, high=high)
        for layout in LAYOUTS.values():
            assert_close(function(on_npu(x, layout)), function(reference(x)), factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_unary_in_place(name: str, dtype: torch.dtype) -> None:
    low, high = UNARY[name]
    x = numbers((4, 6), dtype, low=low, high=high)
    for layout in LAYOUTS.values():
        there = on_npu(x, layout)
        getattr(there, f"{name}_")()
        assert_close(there, getattr(reference(x).clone(), f"{name}_")(), factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, dtype: torch.dtype) -> None:
    function = BINARY[name]
    for shape in SHAPES:
        x, y = numbers(shape, dtype), numbers(shape, dtype, seed=1, low=0.5)
        if name in STEPS:
            x, y = x.round(), y.round().clamp(min=1)
        for layout in LAYOUTS.values():
            expected = function(reference(x), reference(y))
            assert_close(function(on_npu(x, layout), on_npu(y, layout)), expected, factor=4)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("function", (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum))
def test_binary_of_integers(function: Function, dtype: torch.dtype) -> None:
    x, y = numbers((5, 7), dtype), numbers((5, 7), dtype, seed=1)
    assert_close(function(x.to("npu"), y.to("npu")), function(x, y))


@pytest.mark.parametrize("shapes", [((3, 1), (1, 5)), ((5,), (2, 3, 5)), ((), (4,)), ((2, 1, 4), (3, 1))], ids=str)
def test_broadcasting(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = numbers(shapes[0], torch.float32), numbers(shapes[1], torch.float32, seed=1)
    for function in (torch.add, torch.mul, torch.sub, torch.eq):
        assert_close(function(x.to("npu"), y.to("npu")), function(x, y))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, dtype: torch.dtype) -> None:
    function = getattr(torch, name)
    x, y = numbers((6, 7), dtype).round(), numbers((6, 7), dtype, seed=1).round()
    assert_close(function(x.to("npu"), y.to("npu")), function(x, y))
    assert_close(function(x.to("npu"), 1), function(x, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_with_a_scalar(name: str, dtype: torch.dtype) -> None:
    x = numbers((5, 7), dtype)
    assert_close(SCALARS[name](x.to("npu")), SCALARS[name](reference(x)), factor=2)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("name", WHOLE_SCALARS)
def test_whole_numbers_with_a_scalar(name: str, dtype: torch.dtype) -> None:
    x = numbers((5, 7), dtype, low=-9, high=9).round()
    for layout in LAYOUTS.values():
        assert_close(WHOLE_SCALARS[name](on_npu(x, layout)), WHOLE_SCALARS[name](reference(x)))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shifts(dtype: torch.dtype) -> None:
    x, y = numbers((4, 9), dtype), numbers((4, 9), dtype, seed=1).abs() % 3
    for function in (operator.lshift, operator.rshift):
        assert_close(function(x.to("npu"), y.to("npu")), function(x, y))
        assert_close(function(x.to("npu"), 2), function(x, 2))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_bits_of_a_scalar(dtype: torch.dtype) -> None:
    x = numbers((4, 9), dtype)
    for function in (operator.and_, operator.or_, operator.xor):
        assert_close(function(x.to("npu"), 6), function(x, 6))


@pytest.mark.parametrize("dtype", (torch.bool, *INTEGERS), ids=str)
def test_bits_and_logic(dtype: torch.dtype) -> None:
    x, y = numbers((4, 9), dtype), numbers((4, 9), dtype, seed=1)
    for function in (
        operator.and_,
        operator.or_,
        operator.xor,
        torch.logical_and,
        torch.logical_or,
        torch.logical_xor,
    ):
        assert_close(function(x.to("npu"), y.to("npu")), function(x, y))
    assert_close(torch.bitwise_not(x.to("npu")), torch.bitwise_not(x))
    assert_close(torch.logical_not(x.to("npu")), torch.logical_not(x))


def test_infinity_and_nan() -> None:
    x = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), 0.0])
    for function in (torch.isfinite, torch.isnan, torch.isinf, torch.isposinf, torch.isneginf):
        assert_close(function(x.to("npu")), function(x))
    assert_close(torch.nan_to_num(x.to("npu"), 1, 2, 3), torch.nan_to_num(x, 1, 2, 3))


@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS, torch.bool], ids=str)
@pytest.mark.parametrize("target", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    x = numbers((4, 9), source, low=0, high=100)
    for layout in LAYOUTS.values():
        assert_close(on_npu(x, layout).to(target), x.to(target))


@pytest.mark.parametrize("source", [*FLOATS, torch.int32], ids=str)
@pytest.mark.parametrize("target", [*FLOATS, torch.int32, torch.bool], ids=str)
def test_npu_dtype_cast(source: torch.dtype, target: torch.dtype) -> None:
    x = numbers((4, 9), source, low=-100, high=100)
    for layout in LAYOUTS.values():
        assert_close(torch_npu.npu_dtype_cast(on_npu(x, layout), target), x.to(target))


def test_complex_numbers() -> None:
    x, y = numbers((4, 9), torch.float32), numbers((4, 9), torch.float32, seed=1)
    for function in (torch.complex, torch.polar):
        actual, expected = function(x.to("npu"), y.to("npu")).cpu(), function(x, y)
        torch.testing.assert_close(torch.view_as_real(actual), torch.view_as_real(expected))
    assert_close(torch.angle(x.to("npu")), torch.angle(x))


def test_type_promotion() -> None:
    whole, real = numbers((3, 4), torch.int64), numbers((3, 4), torch.float32)
    for function in (torch.add, torch.mul, torch.div, torch.sub):
        assert_close(function(whole.to("npu"), real.to("npu")), function(whole, real))
    assert (whole.to("npu") / 2).dtype == torch.float32
    assert (numbers((3,), torch.float16).to("npu") + real[0, :3].to("npu")).dtype == torch.float32
