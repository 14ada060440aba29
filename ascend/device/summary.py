"""Every device of this machine at a glance: what it is, its memory, which one is preferred, why others are absent."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch

from ascend.device.discovery import (
    DEVICE_TYPES,
    DeviceError,
    default_device,
    device_count,
    get_all_devices,
    why_absent,
)
from ascend.device.properties import get_chip, get_device_name, inference_dtypes
from ascend.memory import read_memory


def device_summary() -> dict[str, Any]:
    """What there is to say of all devices, as JSON takes it. Does not raise: what a device answers is in its entry.

    Returns:
        `devices`: by name, the best first, `name`, `chip` (CANN's name of an NPU's), `dtypes` (the best for inference
        first) and `memory` in bytes, see `ascend.memory.read_memory`; of one that does not answer, `error` alone.
        `total_devices`, `npu_devices` and `cuda_devices`: how many there are, the CPU being one.
        `absent`: by type, why there is none.
        `preferred`: the name of the one that `DeviceManager()` takes, and `preferred_because`; None where
        `PREFERRED_DEVICE` names none that is there.
        `versions` of torch, torch_npu and the CUDA that torch is built for, None for what is not there.
    """
    devices = get_all_devices()
    counts = {kind: device_count(kind) for kind in DEVICE_TYPES}
    preferred, reason = _preference()
    return {
        "preferred": preferred,
        "preferred_because": reason,
        "total_devices": len(devices),
        "npu_devices": counts["npu"],
        "cuda_devices": counts["cuda"],
        "devices": {str(device): _describe(device) for device in devices},
        "absent": {kind: why_absent(kind) for kind, count in counts.items() if count == 0},
        "versions": {
            "torch": torch.__version__,
            "torch_npu": _version("torch_npu"),
            "cuda": torch.version.cuda,
        },
    }


def _preference() -> tuple[str | None, str]:
    try:
        device = default_device()
    except DeviceError as error:
        return None, str(error)
    wish = os.environ.get("PREFERRED_DEVICE")
    return str(device), f"PREFERRED_DEVICE={wish}" if wish else "the best there is: NPU, then CUDA, then CPU"


def _describe(device: torch.device) -> dict[str, Any]:
    try:
        return {
            "name": get_device_name(device),
            "chip": get_chip(device),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in inference_dtypes(device)],
            "memory": read_memory(device),
        }
    except RuntimeError as error:  # another process has it for itself, or it is broken
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
