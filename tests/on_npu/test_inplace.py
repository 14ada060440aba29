"""Operators that change their first operand, against the CPU: what they write, and that they write nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.on_npu.helpers import FLOATS, INTEGERS, LAYOUTS, Layout, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ARITHMETIC: dict[str, Change] = {
    "add": lambda x, y: x.add_(y, alpha=3),
    "add scalar": lambda x, y: x.add_(2, alpha=3),
    "sub": lambda x, y: x.sub_(y, alpha=3),
    "sub scalar": lambda x, y: x.sub_(2, alpha=3),
    "mul": lambda x, y: x.mul_(y),
    "mul scalar": lambda x, y: x.mul_(3),
    "div": lambda x, y: x.div_(y),
    "div scalar": lambda x, y: x.div_(3),
    "pow": lambda x, y: x.abs_().pow_(y),
    "pow scalar": lambda x, y: x.pow_(3),
    "atan2": lambda x, y: x.atan2_(y),
    "lerp": lambda x, y: x.lerp_(y, 0.25),
    "lerp tensor": lambda x, y: x.lerp_(y, y / 8),
    "addcmul": lambda x, y: x.addcmul_(y[:1], y, value=0.5),
    "addcdiv": lambda x, y: x.addcdiv_(y[:1], y, value=0.5),
    "clamp": lambda x, y: x.clamp_(-1, 2),
    "clamp min": lambda x, y: x.clamp_(min=-1),
    "clamp_min": lambda x, y: x.clamp_min_(-1),
    "clamp max": lambda x, y: x.clamp_(max=1),
    "clamp_max": lambda x, y: x.clamp_max_(1),
    "clamp tensor": lambda x, y: x.clamp_(-y, y[:1]),
    "clamp_min tensor": lambda x, y: x.clamp_min_(y),
    "clamp_max tensor": lambda x, y: x.clamp_max_(y),
    "round decimals": lambda x, y: x.round_(decimals=1),
    "sinc": lambda x, y: x.sinc_(),
    "addr": lambda x, y: x.addr_(y[:, 0], y[0], beta=0.5, alpha=2),
}
STEPS: dict[str, Change] = {  # of whole numbers: a last bit of the quotient moves the result by a whole one
    "div floor": lambda x, y: x.div_(y, rounding_mode="floor"),
    "div floor scalar": lambda x, y: x.div_(2, rounding_mode="floor"),
    "div trunc": lambda x, y: x.div_(y, rounding_mode="trunc"),
    "div trunc scalar": lambda x, y: x.div_(2, rounding_mode="trunc"),
    "floor divide": lambda x, y: x.floor_divide_(y),
    "floor divide scalar": lambda x, y: x.floor_divide_(2),
    "fmod": lambda x, y: x.fmod_(y),
    "fmod scalar": lambda x, y: x.fmod_(2),
    "remainder": lambda x, y: x.remainder_(y),
    "remainder scalar": lambda x, y: x.remainder_(2),
    "add": lambda x, y: x.add_(y, alpha=3),
    "sub": lambda x, y: x.sub_(y, alpha=3),
    "mul": lambda x, y: x.mul_(y),
    "logical and": lambda x, y: x.logical_and_(y - 1),
    "logical or": lambda x, y: x.logical_or_(y - 1),
    "logical xor": lambda x, y: x.logical_xor_(y - 1),
    "logical not": lambda x, y: x.logical_not_(),
}
BITS: dict[str, Change] = {
    "and": lambda x, y: x.bitwise_and_(y),
    "and scalar": lambda x, y: x.bitwise_and_(6),
    "or": lambda x, y: x.bitwise_or_(y),
    "or scalar": lambda x, y: x.bitwise_or_(6),
    "xor": lambda x, y: x.bitwise_xor_(y),
    "xor scalar": lambda x, y: x.bitwise_xor_(6),
    "not": lambda x, y: x.bitwise_not_(),
}
COMPARISONS = ("eq_", "ne_", "lt_", "le_", "gt_", "ge_")


def _index(x: torch.Tensor, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=x.device)


MOVES: dict[str, Change] = {
    "tril": lambda x, y: x.tril_(1),
    "triu": lambda x, y: x.triu_(-1),
    "zero": lambda x, y: x.zero_(),
    "fill": lambda x, y: x.fill_(5),
    "fill tensor": lambda x, y: x.fill_(y[0, 1]),
    "fill diagonal": lambda x, y: x.fill_diagonal_(5),
    "fill diagonal and wrap": lambda x, y: x.fill_diagonal_(5, wrap=True),
    "masked fill": lambda x, y: x.masked_fill_(y > 1, 5),
    "masked fill tensor": lambda x, y: x.masked_fill_(y > 1, y[0, 1]),
    "masked scatter": lambda x, y: x.masked_scatter_(y > 1, y + 1),
    "index copy": lambda x, y: x.index_copy_(1, _index(x, 2, 0), y[:, :2]),
    "index fill": lambda x, y: x.index_fill_(1, _index(x, 2, 0), 5),
    "index fill tensor": lambda x, y: x.index_fill_(0, _index(x, 3, 0), y[0, 1]),
    "index add": lambda x, y: x.index_add_(0, _index(x, 3, 0), y[:2], alpha=2),
    "scatter": lambda x, y: x.scatter_(1, _index(x, 2, 0, 1).expand(7, 3), y),
    "scatter value": lambda x, y: x.scatter_(0, _index(x, 2, 0, 1).expand(7, 3), 5),
    "scatter add": lambda x, y: x.scatter_add_(0, _index(x, 2, 0, 2).expand(7, 3), y),
    "copy": lambda x, y: x.copy_(y),
    "copy a row": lambda x, y: x.copy_(y[2]),
    "copy of another dtype": lambda x, y: x.copy_(y.int()),
}


def check(change: Change, x: torch.Tensor, y: torch.Tensor, layout: Layout, factor: float = 1) -> None:
    there, other = on_npu(x, layout), on_npu(y, layout)
    changed = change(there, other)
    assert changed is there
    expected = change(reference(x).clone(), reference(y).clone())
    assert_close(there, expected, factor)
    assert_close(other, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str, dtype: torch.dtype) -> None:
    x, y = numbers((7, 3), dtype, low=-2), numbers((7, 3), dtype, seed=1, low=0.5)
    for layout in LAYOUTS.values():
        check(ARITHMETIC[name], x, y, layout, factor=4)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_whole_numbers(name: str, dtype: torch.dtype) -> None:
    x, y = numbers((7, 3), dtype, low=-9, high=9).round(), numbers((7, 3), dtype, seed=1).round().abs().clamp(min=1)
    for layout in LAYOUTS.values():
        check(STEPS[name], x, y, layout)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", BITS)
def test_bits(name: str, dtype: torch.dtype) -> None:
    x, y = numbers((7, 3), dtype), numbers((7, 3), dtype, seed=1)
    for layout in LAYOUTS.values():
        check(BITS[name], x, y, layout)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, dtype: torch.dtype) -> None:
    x, y = numbers((7, 3), dtype).round(), numbers((7, 3), dtype, seed=1).round()
    for layout in LAYOUTS.values():
        check(lambda x, y: getattr(x, name)(y), x, y, layout)
        check(lambda x, y: getattr(x, name)(1), x, y, layout)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str, dtype: torch.dtype) -> None:
    x, y = numbers((7, 3), dtype), numbers((7, 3), dtype, seed=1).round()
    for layout in LAYOUTS.values():
        check(MOVES[name], x, y, layout)


def test_a_sum_into_places() -> None:
    x, y = numbers((7, 3), torch.float32), numbers((7, 3), torch.float32, seed=1)
    for layout in LAYOUTS.values():
        check(lambda x, y: x.scatter_reduce_(0, _index(x, 2, 0, 2).expand(7, 3), y, "sum"), x, y, layout)


def test_infinity_and_nan() -> None:
    x = torch.tensor([[1.0, float("inf"), -float("inf"), float("nan"), 0.0]])
    for layout in LAYOUTS.values():
        check(lambda x, y: x.nan_to_num_(1, 2, 3), x, torch.ones(1), layout)


def test_a_change_of_a_view_leaves_the_rest() -> None:
    whole = numbers((4, 6), torch.float32)
    there = whole.to("npu")
    for x in (whole, there):
        x[1:3, ::2].add_(1).mul_(x[0, 0])
    assert_close(there, whole)
