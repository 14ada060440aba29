"""Losses and what they send back, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_npu

from tests.on_npu.helpers import FLOATS, SATURATES, assert_close, reference
from tests.on_npu.inputs import numbers

Loss = Callable[..., torch.Tensor]

not_310p = pytest.mark.skipif(SATURATES, reason="310P has no kernel")
REDUCTIONS = ("none", "mean", "sum")
OF_NUMBERS: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": lambda x, y, reduction: F.smooth_l1_loss(x, y, beta=0.5, reduction=reduction),
    "binary cross entropy": lambda x, y, reduction: F.binary_cross_entropy(
        x.sigmoid(), y.sigmoid(), reduction=reduction
    ),
    "weighted binary cross entropy": lambda x, y, reduction: F.binary_cross_entropy(
        x.sigmoid(), y.sigmoid(), y.detach() + 4, reduction=reduction
    ),
}
OF_NUMBERS_ON_910B: dict[str, Loss] = {
    "kl div": lambda x, y, reduction: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction=reduction),
    "kl div of logarithms": lambda x, y, reduction: F.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), reduction=reduction, log_target=True
    ),
    "soft margin": lambda x, y, reduction: F.soft_margin_loss(x, y.detach().sign(), reduction=reduction),
}


def compare(loss: Loss, *operands: torch.Tensor, factor: float = 8) -> None:
    """Value and gradients of `loss` on the NPU are those on the CPU in float32."""
    here = [reference(x).clone().requires_grad_() for x in operands]
    there = [x.to("npu").requires_grad_() for x in operands]
    expected, actual = loss(*here), loss(*there)
    assert_close(actual.detach(), expected.detach(), factor=factor)
    upstream = numbers(expected.shape, actual.dtype, seed=99)
    wanted = torch.autograd.grad(expected, here, reference(upstream), allow_unused=True)
    found = torch.autograd.grad(actual, there, upstream.to("npu"), allow_unused=True)
    for result, gradient in zip(found, wanted, strict=True):
        assert (result is None) == (gradient is None)
        if result is not None and gradient is not None:
            assert_close(result, gradient, factor=factor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", (*OF_NUMBERS, *(pytest.param(n, marks=not_310p) for n in OF_NUMBERS_ON_910B)))
def test_losses_of_numbers(name: str, reduction: str, dtype: torch.dtype) -> None:
    loss = {**OF_NUMBERS, **OF_NUMBERS_ON_910B}[name]
    x, y = numbers((3, 5, 7), dtype), numbers((3, 5, 7), dtype, seed=1)
    compare(lambda x, y: loss(x, y, reduction=reduction), x, y, factor=32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy_with_logits(reduction: str, weighted: bool, dtype: torch.dtype) -> None:
    x, target = numbers((4, 6), dtype), numbers((4, 6), dtype, seed=1, low=0, high=1)
    weights = [numbers(shape, dtype, seed=2, low=0.5) if weighted else None for shape in ((4, 6), (6,))]

    def loss(x: torch.Tensor) -> torch.Tensor:
        weight, pos_weight = (None if w is None else w.to(x.device, x.dtype) for w in weights)
        arguments = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
        return F.binary_cross_entropy_with_logits(x, target.to(x.device, x.dtype), **arguments)

    compare(loss, x, factor=32)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(reduction: str, shape: tuple[int, ...], weighted: bool, dtype: torch.dtype) -> None:
    x, weight = numbers(shape, dtype), numbers((5,), dtype, seed=1, low=0.5)
    target = torch.randint(0, 5, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(2))
    target.flatten()[1] = -100  # the class that is left out

    def loss(x: torch.Tensor) -> torch.Tensor:
        of_classes = weight.to(x.device, x.dtype) if weighted else None
        return F.cross_entropy(x, target.to(x.device), of_classes, reduction=reduction)

    compare(loss, x, factor=32)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_npu_cross_entropy_loss(reduction: str, weighted: bool, smoothing: float, dtype: torch.dtype) -> None:
    x, weight = numbers((6, 5), dtype), numbers((5,), torch.float32, seed=1, low=0.5)
    target = torch.tensor([0, 4, -100, 2, 2, 1])
    arguments = {"reduction": reduction, "ignore_index": -100, "label_smoothing": smoothing}

    def loss(x: torch.Tensor) -> torch.Tensor:
        of_classes = weight.to(x.device) if weighted else None
        if x.device.type == "npu":
            return torch_npu.npu_cross_entropy_loss(x, target.to(x.device), of_classes, **arguments)[0]
        return F.cross_entropy(x, target, of_classes, **arguments).reshape(-1)

    compare(loss, x, factor=32)
