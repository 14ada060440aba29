"""Values too large for the arithmetic, which would pass unseen into the pictures."""

from collections.abc import Sequence

import torch
from PIL import Image


def clear_overflow_flag(device: torch.device) -> None:
    """Forget earlier overflows, where the chip keeps a flag of them."""
    if saturates(device):
        torch.get_device_module(device).clear_npu_overflow_flag()


def overflow_warning(images: Sequence[Image.Image], device: torch.device) -> str | None:
    """What went wrong since `clear_overflow_flag`, or None.

    Usually an overflow becomes NaN and NaN a black picture. A chip that saturates goes on with the largest number
    instead, so its pictures are wrong without being black, and only the chip's flag tells.
    """
    advice = "try another --scheduler or a lower --guidance_scale"
    if saturates(device):
        if torch.get_device_module(device).get_npu_overflow_flag():
            return f"float16 values overflowed and were clipped, the pictures may be wrong; {advice}"
    elif any(image.getbbox() is None for image in images):
        return f"a picture is all black, which NaN or infinity in the model's output turns into; {advice}"
    return None


def saturates(device: torch.device) -> bool:
    """Whether overflow gives the largest number and not infinity: Ascend 310P and 910A, and no other device.

    Source: INF_NAN_MODE_ENABLE in the environment variables of the Ascend extension for PyTorch. It may be switched,
    so torch_npu is asked.
    """
    return device.type == "npu" and not torch.get_device_module(device).utils.is_support_inf_nan()
