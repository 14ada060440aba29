"""Memory of all devices of this machine together, and of one; `ascend.memory` reads it."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ascend.device.discovery import find_device, get_all_devices
from ascend.memory import give_back_memory, read_memory

GIB = 2**30
REPORTED = {"npu": ("npu_memory", "npu"), "cuda": ("vram", "gpu")}


def get_memory_info(device: torch.device | None = None) -> dict[str, int]:
    """Memory of `device` (default: the best) in bytes, see `ascend.memory.read_memory`."""
    return read_memory(device or find_device())


def memory_report() -> dict[str, dict[str, Any]]:
    """Memory of the host and of every accelerator, in GiB.

    Returns:
        `ram`: `total_gb`, `used_gb`, `available_gb` and `percent` (used) of the host, or of the control group that
        limits this process there, whoever uses it. `npu_memory` with `npu_0` and so on, and `vram` with `gpu_0`: of
        each device `total_gb` and `free_gb`, whoever uses the rest; of this process `allocated_gb`, `reserved_gb` and
        `max_allocated_gb`. Both are empty where there is no such device.
    """
    report: dict[str, dict[str, Any]] = {"ram": {}, "npu_memory": {}, "vram": {}}
    for device in get_all_devices():
        memory = read_memory(device)
        if device.type == "cpu":
            used = memory["total"] - memory["free"]
            report["ram"] = _in_gib(total=memory["total"], used=used, available=memory["free"])
            report["ram"]["percent"] = 100 * used / memory["total"]
        else:
            section, name = REPORTED[device.type]
            memory["max_allocated"] = memory.pop("peak")
            report[section][f"{name}_{device.index}"] = _in_gib(**memory)
    return report


def _in_gib(**memory: int) -> dict[str, float]:
    return {f"{name}_gb": size / GIB for name, size in memory.items()}


def memory_cleanup() -> None:
    """Collect garbage, then return what torch's allocators hold unused, on every device, and the C library."""
    gc.collect()  # tensors in circles of references are freed first
    # An accelerator's cache is emptied on all devices of its type at once.
    for device in {device.type: device for device in get_all_devices()}.values():
        give_back_memory(device)
