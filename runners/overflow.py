"""Values too large for the arithmetic, which would pass unseen into the pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def clear_overflow_flag(device: torch.device) -> None:
    """Forget earlier overflows, where the chip keeps a flag of them."""
    if saturates(device):
        torch.get_device_module(device).clear_npu_overflow_flag()


def overflow_warning(
    images: Sequence[Image.Image],
    device: torch.device,
    advice: str = "try another --scheduler or a lower --guidance_scale",
) -> str | None:
    """What went wrong since `clear_overflow_flag`, or None; `advice` says what to do.

    Usually an overflow becomes NaN and NaN a black picture. A chip that saturates goes on with the largest number
    instead, so its pictures are wrong without being black, and only the chip's flag tells.
    """
    if saturates(device):
        if torch.get_device_module(device).get_npu_overflow_flag():
            return f"float16 values overflowed and were clipped, the pictures may be wrong; {advice}"
    elif any(image.getbbox() is None for image in images):
        return f"a picture is all black, which NaN or infinity in the model's output turns into; {advice}"
    return None


class OverflowWatch:
    """Which steps of a loop had values too large for float16, on a chip that clips them and keeps a flag of it.

    It asks for the flag in each step, for which the host waits: little beside a step of such a chip.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_on = saturates(device)
        self._module: Any = torch.get_device_module(device) if self.is_on else None
        self._steps: list[int] = []
        if self.is_on:
            clear_overflow_flag(device)

    def see(self, step: int) -> None:
        """Look at the flag after a step, numbered from 0, and forget it."""
        if self.is_on and self._module.get_npu_overflow_flag():
            self._steps.append(step)
            self._module.clear_npu_overflow_flag()

    def warning(self, steps: int, advice: str) -> str | None:
        """What was seen in a loop of so many steps, None if nothing was."""
        if not self._steps:
            return None
        numbers = ", ".join(str(step + 1) for step in self._steps)
        return f"values overflowed and were clipped in step {numbers} of {steps}, the picture may be wrong; {advice}"


def saturates(device: torch.device) -> bool:
    """Whether overflow gives the largest number and not infinity: Ascend 310P and 910A, and no other device.

    Source: INF_NAN_MODE_ENABLE in the environment variables of the Ascend extension for PyTorch. It may be switched,
    so torch_npu is asked.
    """
    return device.type == "npu" and not torch.get_device_module(device).utils.is_support_inf_nan()
