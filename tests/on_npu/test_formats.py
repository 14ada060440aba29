"""Private formats: casts there and back, and products with a weight that is stored in one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torch_npu

from tests.on_npu.helpers import assert_close
from tests.on_npu.inputs import numbers

ND, NCHW, FRACTAL_Z, FRACTAL_NZ = 2, 0, 4, 29


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


@pytest.mark.parametrize("shape", [(16, 16), (20, 33), (3, 17, 40), (64, 48)], ids=str)
def test_fractal_nz_there_and_back(shape: tuple[int, ...]) -> None:
    x = numbers(shape, torch.float16)
    stored = torch_npu.npu_format_cast(x.to("npu"), FRACTAL_NZ)
    assert torch_npu.get_npu_format(stored) == FRACTAL_NZ
    assert torch.equal(stored.cpu(), x)
    back = torch_npu.npu_format_cast(stored, ND)
    assert torch_npu.get_npu_format(back) in (ND, NCHW)
    assert torch.equal(back.cpu(), x)


def test_fractal_z_there_and_back() -> None:
    x = numbers((20, 5, 3, 3), torch.float16)
    stored = torch_npu.npu_format_cast(x.to("npu"), FRACTAL_Z)
    assert torch_npu.get_npu_format(stored) == FRACTAL_Z
    assert torch.equal(stored.cpu(), x)


def test_a_stored_weight_takes_the_memory_of_whole_fractals() -> None:
    before = torch.npu.memory_allocated()
    stored = torch_npu.npu_format_cast(torch.zeros(17, 17, dtype=torch.float16, device="npu"), FRACTAL_NZ)
    assert torch.npu.memory_allocated() - before >= 32 * 32 * stored.element_size()


@pytest.mark.parametrize("bias", (False, True))
def test_products_with_a_weight_in_fractal_nz(bias: bool) -> None:
    x, weight, offset = (numbers(s, torch.float16, i, -1, 1) for i, s in enumerate(((2, 5, 33), (20, 33), (20,))))
    stored = torch_npu.npu_format_cast(weight.to("npu"), FRACTAL_NZ)
    out = F.linear(x.to("npu"), stored, offset.to("npu") if bias else None)
    assert_close(out, F.linear(x.float(), weight.float(), offset.float() if bias else None), factor=4)
