"""Products and convolutions: exact 16-bit operands, float32 sums, one rounding; float32 as the chip has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.on_npu.helpers import FLOATS, LAYOUTS, SATURATES, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PRODUCTS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "mm": (torch.mm, (5, 7), (7, 3)),
    "matmul of one row": (torch.matmul, (7,), (7, 3)),
    "matmul of three dimensions": (torch.matmul, (2, 5, 7), (7, 3)),
    "matmul of batches": (torch.matmul, (2, 1, 5, 7), (3, 7, 4)),
    "bmm": (torch.bmm, (4, 5, 7), (4, 7, 3)),
    "mv": (torch.mv, (5, 7), (7,)),
    "linear": (F.linear, (2, 5, 7), (3, 7)),
    "linear with bias": (lambda x, y: F.linear(x, y, y[:, 0]), (2, 5, 7), (3, 7)),
    "addmm": (lambda x, y: torch.addmm(x[:, :3], x, y, beta=0.5, alpha=2), (5, 7), (7, 3)),
    "baddbmm": (lambda x, y: torch.baddbmm(x[:, :, :3], x, y, beta=0.5, alpha=2), (4, 5, 7), (4, 7, 3)),
    "baddbmm without self": (lambda x, y: torch.baddbmm(x[:, :, :3], x, y, beta=0, alpha=2), (4, 5, 7), (4, 7, 3)),
    "addmm in place": (lambda x, y: (x[:, :3] + 0).addmm_(x, y, beta=0.5, alpha=2), (5, 7), (7, 3)),
    "baddbmm in place": (lambda x, y: (x[:, :, :3] + 0).baddbmm_(x, y, beta=0.5, alpha=2), (4, 5, 7), (4, 7, 3)),
    "addbmm": (lambda x, y: torch.addbmm(x[0, :, :3], x, y, beta=0.5, alpha=2), (4, 5, 7), (4, 7, 3)),
    "addmv": (lambda x, y: torch.addmv(x[:, 2], x, y, beta=0.5, alpha=2), (5, 7), (7,)),
    "addr": (lambda x, y: torch.addr(y[:5], x[:, 0], y[0], beta=0.5, alpha=2), (5, 7), (7, 3)),
    "dot": (torch.dot, (7,), (7,)),
    "empty": (torch.mm, (0, 7), (7, 3)),
    "nothing to sum": (torch.mm, (5, 0), (0, 3)),
    "wide": (torch.mm, (33, 300), (300, 65)),
}


def as_the_matrix_unit_reads(x: torch.Tensor) -> torch.Tensor:
    """310P rounds float32 operands to float16."""
    return x.half().float() if SATURATES and x.dtype == torch.float32 else reference(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    function, left, right = PRODUCTS[name]
    x, y = numbers(left, dtype, low=-1, high=1), numbers(right, dtype, seed=1, low=-1, high=1)
    if SATURATES and dtype == torch.float32:
        x, y = x.half().float(), y.half().float()
    for layout in LAYOUTS.values():
        assert_close(function(on_npu(x, layout), on_npu(y, layout)), function(reference(x), reference(y)), factor=4)


def test_float32_products_are_float16_on_310p_and_float32_elsewhere() -> None:
    x = torch.full((1, 1), 1 + 2.0**-12)
    product = (x.to("npu") @ torch.ones(1, 1, device="npu")).item()
    assert product == (1.0 if SATURATES else 1 + 2.0**-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 0, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)])
@pytest.mark.parametrize("kernel", (1, 3))
def test_convolutions(kernel: int, stride: int, padding: int, dilation: int, groups: int, dtype: torch.dtype) -> None:
    x, weight = numbers((2, 4, 9, 8), dtype), numbers((6, 4 // groups, kernel, kernel), dtype, seed=1, low=-1, high=1)
    bias = numbers((6,), dtype, seed=2)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    expected = F.conv2d(*(as_the_matrix_unit_reads(t) for t in (x, weight)), reference(bias), **arguments)
    # 910B rounds float32 operands to HF32, as its default asks for.
    factor = 4 if dtype != torch.float32 else 2000
    for layout in LAYOUTS.values():
        actual = F.conv2d(on_npu(x, layout), weight.to("npu"), bias.to("npu"), **arguments)
        assert_close(actual, expected, factor=factor)


def test_transposed_and_one_dimensional_convolutions() -> None:
    x, weight = numbers((2, 4, 5, 6), torch.float16), numbers((4, 3, 3, 3), torch.float16, seed=1)
    there = F.conv_transpose2d(x.to("npu"), weight.to("npu"), stride=2, padding=1)
    assert_close(there, F.conv_transpose2d(x.float(), weight.float(), stride=2, padding=1), factor=4)
    x, weight = numbers((2, 4, 11), torch.float16), numbers((6, 4, 3), torch.float16, seed=1)
    assert_close(F.conv1d(x.to("npu"), weight.to("npu")), F.conv1d(x.float(), weight.float()), factor=4)


def test_products_through_the_old_operator_interface() -> None:
    x, weight = numbers((5, 7), torch.float16), numbers((3, 7), torch.float16, seed=1)
    torch.npu.set_compile_mode(jit_compile=True)
    try:
        products = (
            torch.mm(x.to("npu"), weight.to("npu").t()),
            torch.mm(x.to("npu"), weight.t().contiguous().to("npu")),
        )
    finally:
        torch.npu.set_compile_mode(jit_compile=False)
    for product in products:
        assert_close(product, x.float() @ weight.float().t(), factor=4)
