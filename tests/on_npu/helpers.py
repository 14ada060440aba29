"""What the operator tests share: inputs of many layouts, and the comparison with float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ascend.chips import family_of
from ascend.device import find_device, get_chip

FAMILY = family_of(get_chip(find_device("npu")))
assert FAMILY is not None, "the emulator has no chip that ascend.chips does not list"
SATURATES = FAMILY.saturates
FLOATS = (torch.float32, torch.float16) if SATURATES else (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# A unit in the last place: a result may be rounded twice where the reference is rounded once.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}

Layout = Callable[[torch.Tensor], torch.Tensor]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor, behind an offset."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


LAYOUTS: dict[str, Layout] = {"contiguous": lambda x: x, "transposed": transposed, "strided": strided}
SHAPES = ((3, 5), (2, 3, 17), (1, 1), (0, 4), (16, 32))


def on_npu(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`x` on the NPU in a layout there, not merely copied from one on the CPU."""
    return layout(x.to("npu"))


def reference(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: what is computed from it has no error of its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def assert_close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1) -> None:
    """`actual`, on the NPU, against a reference on the CPU: within `factor` units in the last place of its dtype."""
    assert actual.device.type == "npu"
    result = actual.cpu()
    assert result.shape == expected.shape
    if not result.is_floating_point():
        assert torch.equal(result, expected.to(result.dtype))
        return
    if SATURATES and result.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        expected = expected.nan_to_num(0, largest, -largest).clamp(-largest, largest)
    tolerance = factor * TOLERANCES[result.dtype]
    torch.testing.assert_close(
        result.double(), expected.to(result.dtype).double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
