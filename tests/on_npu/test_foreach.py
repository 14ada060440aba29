"""Operators on lists of tensors, which optimisers and averages of weights call, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.on_npu.helpers import FLOATS, LAYOUTS, SATURATES, Layout, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

List = list[torch.Tensor]

SHAPES = ((3, 5), (17,), (), (2, 3, 4))
UNARY = (
    *("abs", "asin", "acos", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac", "log"),
    *("log10", "log1p", "log2", "neg", "reciprocal", "round", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh"),
    "trunc",
)
SCALES = (0.5, 2.0, 3.0, 1.5)  # a number for each shape
WITH_NUMBERS = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_min", "clamp_max")
WITH_LISTS = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_min", "clamp_max")
# An operator, and what follows its first list; `y` and `z` are lists too.
Arguments = Callable[[List, List], tuple[Any, ...]]
CALLS: dict[str, tuple[str, Arguments]] = {
    **{name: (name, lambda y, z: ()) for name in UNARY},
    **{f"{name} a number": (name, lambda y, z: (0.25,)) for name in WITH_NUMBERS},
    **{f"{name} numbers": (name, lambda y, z: (SCALES,)) for name in WITH_NUMBERS},
    **{f"{name} a list": (name, lambda y, z: (y,)) for name in WITH_LISTS},
    "lerp": ("lerp", lambda y, z: (y, 0.1)),
    "lerp by a list": ("lerp", lambda y, z: (y, z)),
    **{f"{name} scaled": (name, lambda y, z: (y, z, -0.1)) for name in ("addcmul", "addcdiv")},
    **{f"{name} numbers": (name, lambda y, z: (y, z, SCALES)) for name in ("addcmul", "addcdiv")},
    **{f"{name} tensor": (name, lambda y, z: (y, z, torch.tensor(SCALES))) for name in ("addcmul", "addcdiv")},
}


def tensors(dtype: torch.dtype, seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> List:
    """Within (0, 1), where all functions are defined, but not where rounding moves a result by a whole one."""
    return [numbers(shape, dtype, seed + i, low=0.1, high=0.45) for i, shape in enumerate(shapes)]


def there(lists: List, layout: Layout) -> List:
    return [on_npu(x, layout) if x.dim() else x.to("npu") for x in lists]


def assert_all_close(actual: List, expected: List, factor: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, factor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_lists(name: str, dtype: torch.dtype) -> None:
    operator, arguments = CALLS[name]
    x, y, z = (tensors(dtype, seed) for seed in (0, 10, 20))
    exact = [[reference(one) for one in several] for several in (x, y, z)]
    expected = getattr(torch, f"_foreach_{operator}")(exact[0], *arguments(*exact[1:]))
    for layout in LAYOUTS.values():
        first, *others = (there(several, layout) for several in (x, y, z))
        call = getattr(torch, f"_foreach_{operator}")
        assert_all_close(call(first, *arguments(*others)), expected, factor=4)
        getattr(torch, f"_foreach_{operator}_")(first, *arguments(*others))
        assert_all_close(first, expected, factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scaled_lists(dtype: torch.dtype) -> None:
    x, y = tensors(dtype, 0), tensors(dtype, 10)
    for name in ("add", "sub"):
        call = getattr(torch, f"_foreach_{name}")
        expected = call([reference(one) for one in x], [reference(one) for one in y], alpha=0.5)
        assert_all_close(call(there(x, lambda t: t), there(y, lambda t: t), alpha=0.5), expected, factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", (1, 2, torch.inf))
def test_norms(order: float, dtype: torch.dtype) -> None:
    """More tensors than one launch takes; an infinite order is none of the operator's, and goes one by one."""
    many = tuple((7, 1 + i) for i in range(30))
    x = tensors(dtype, 0, many)
    expected = torch._foreach_norm([reference(one) for one in x], order)
    assert_all_close(list(torch._foreach_norm([one.to("npu") for one in x], order)), list(expected), factor=4)
    wide = torch._foreach_norm([one.to("npu") for one in x], order, dtype=torch.float32)
    assert_all_close(list(wide), list(expected), factor=8)


def test_a_power_of_lists() -> None:
    x = tensors(torch.float32, 0)
    assert_all_close(list(torch._foreach_pow(2.0, there(x, lambda t: t))), list(torch._foreach_pow(2.0, x)), factor=4)


def test_halves_round_to_even() -> None:
    x = [torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])]
    (rounded,) = torch._foreach_round([x[0].to("npu")])
    assert_close(rounded, torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_copies_and_zeros(dtype: torch.dtype) -> None:
    source = tensors(dtype, 0)
    target = [torch.zeros(shape, dtype=dtype, device="npu") for shape in SHAPES]
    torch._foreach_copy_(target, [x.to("npu") for x in source])
    assert_all_close(target, source, factor=0)
    wide = [torch.zeros(shape, device="npu") for shape in SHAPES]
    torch._foreach_copy_(wide, target)
    assert_all_close(wide, [x.float() for x in source], factor=0)
    torch._foreach_copy_(target, [x.float() for x in source])  # from the host
    assert_all_close(target, source, factor=0)
    torch._foreach_zero_(target)
    assert not any(x.any() for x in target)


def test_integers() -> None:
    x, y = ([numbers((4, 5), torch.int32, seed)] for seed in (0, 1))
    for name in ("add", "sub", "mul", "maximum", "minimum"):
        call = getattr(torch, f"_foreach_{name}")
        assert_all_close(list(call([x[0].to("npu")], [y[0].to("npu")])), list(call(x, y)), factor=0)
        assert_all_close(list(call([x[0].to("npu")], 3)), list(call(x, 3)), factor=0)


@pytest.mark.skipif(SATURATES, reason="310P has no operators on lists: torch_npu takes the tensors one by one")
def test_a_dtype_that_the_chip_refuses() -> None:
    with pytest.raises(RuntimeError, match="ForeachAddScalarV2 on Ascend910B3: the tensors must be integers"):
        torch._foreach_add([torch.ones(3, dtype=torch.int64, device="npu")], 1)
