"""What a device is: its chip, the dtypes that it computes in, its memory."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ascend.chips import BFLOAT16, HALF, family_of
from ascend.device.discovery import device_count, find_device
from ascend.memory import read_memory

HOST = (torch.float32, torch.bfloat16, torch.float16)  # many CPUs have no arithmetic for the halves, and are slow


@functools.cache
def get_chip(device: torch.device) -> str | None:
    """The NPU's chip as CANN names it, such as `"Ascend310P3"`; None for any other device.

    Code that is compiled calls it through `torch.compiler.assume_constant_result`: dynamo cannot trace torch_npu here.
    """
    return torch.get_device_module(device).get_device_name(device) if device.type == "npu" else None


def get_device_name(device: torch.device) -> str:
    """What the device's driver calls it; `"CPU"` for the host."""
    return "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def get_device_info(device: torch.device | None = None) -> dict[str, Any]:
    """What there is to know of `device` (default: the best) without computing on it.

    Returns:
        `type`, `index`, `name`, `chip`, `dtype` (the best one for inference), `count` (devices of that type) and
        `total_memory` in bytes.
    """
    device = device or find_device()
    return {
        "type": device.type,
        "index": device.index,
        "name": get_device_name(device),
        "chip": get_chip(device),
        "dtype": best_dtype(device),
        "count": device_count(device.type),
        "total_memory": read_memory(device)["total"],
    }


def inference_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The floating dtypes that models run in on `device`, the best for inference first.

    bfloat16 is among an accelerator's only where it computes in it and does not emulate it.
    """
    if device.type == "cpu":
        return HOST
    family = family_of(get_chip(device))
    if family is not None:
        return family.dtypes
    module = torch.get_device_module(device)
    emulation = {"including_emulation": False} if device.type == "cuda" else {}  # which torch_npu 2.10 does not take
    return BFLOAT16 if module.is_bf16_supported(**emulation) else HALF


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float16 on other accelerators (Ascend 310P), float32 on the CPU."""
    return inference_dtypes(device)[0]
